"""KServe as a target, on a small OpenShift: what it moves, refuses and keeps."""

import threading
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import find_served
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.deploy import targets
from nudge.components.deploy.deploy import deploy, rollback, serve
from nudge.components.deploy.kserve import kserve, lease, objects, routes
from nudge.components.deploy.settings import DeploySettings
from nudge.pipelines.local import services
from tests.components.deploy.kserve_cluster import PLAIN, SETTINGS, ServingCluster
from tests.components.deploy.stream import Stream
from tests.kubernetes_schemas import problems


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_S3_BUCKET", "b")


def test_shifts_lose_no_requests(cluster: ServingCluster, model: str, registry: str) -> None:
    first = deploy(SETTINGS, registered_model=model, version="v1")
    endpoint = first["endpoint"]
    assert endpoint == f"https://{cluster.router.host}"
    assert first["smoke_answer"] == " v1"
    stream = Stream(endpoint, model, cluster.api.token)
    try:
        assert deploy(SETTINGS, registered_model=model, version="v2")["endpoint"] == endpoint
        assert (cluster.weights(), cluster.up()) == ({"v2": 100}, {"v2"})
        stream.seen()
        serve(SETTINGS, model, {"v2": 75, "v3": 25})
        assert cluster.weights() == {"v2": 75, "v3": 25}
        stream.seen()
        assert stream.next(12) == {" v2", " v3"}
        rollback(SETTINGS, registered_model=model)
        assert (cluster.weights(), cluster.up()) == ({"v2": 100}, {"v2"})
        rollback(SETTINGS, registered_model=model)
        stream.seen()
        assert stream.next(6) == {" v1"}
    finally:
        stream.stop()
    assert stream.faults == []
    assert (cluster.weights(), cluster.up()) == ({"v1": 100}, {"v1"})
    served = with_registry(registry, find_served(model))
    assert served is not None
    assert (served.main, served.endpoint) == ("v1", endpoint)
    (left,) = cluster.api.all("Lease")
    assert "holderIdentity" not in left["spec"]


def test_a_version_that_does_not_load_reports_why_and_gets_no_traffic(
    cluster: ServingCluster, model: str
) -> None:
    deploy(SETTINGS, registered_model=model, version="v1")
    with pytest.raises(UserError) as error:
        deploy(SETTINGS, registered_model=model, version="bad")
    for part in ("ModelLoadFailed", "storage-initializer", "no model in s3://b/bad", "BackOff"):
        assert part in str(error.value)
    assert (cluster.weights(), cluster.up()) == ({"v1": 100}, {"v1"})
    with pytest.raises(UserError, match=r"' Paris' \(P 0.80\), the served one ' Paris' \(P 0.10\)"):
        deploy(SETTINGS, registered_model=model, version="odd")
    assert (cluster.weights(), cluster.up()) == ({"v1": 100}, {"v1"})
    assert cluster.api.token not in str(error.value)


def test_an_image_that_cannot_be_pulled_ends_the_wait(cluster: ServingCluster, model: str) -> None:
    def pull(service: dict[str, Any]) -> bool:
        # KServe copies the labels of the InferenceService to its pods.
        labels = {
            **service["metadata"]["labels"],
            "serving.kserve.io/inferenceservice": service["metadata"]["name"],
        }
        digest = {objects.SETTINGS: service["metadata"]["annotations"][objects.SETTINGS]}
        cluster.api.add(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "p", "labels": labels, "annotations": digest},
                "spec": {"containers": [{"name": "kserve-container", "image": "vllm"}]},
            },
            containerStatuses=[
                {
                    "name": "kserve-container",
                    "image": "i",
                    "imageID": "i",
                    "ready": False,
                    "restartCount": 0,
                    "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no vllm"}},
                }
            ],
        )
        return True

    cluster.on_service = pull
    with pytest.raises(UserError, match="does not start: .*ImagePullBackOff no vllm"):
        deploy(SETTINGS, registered_model=model, version="v1")
    assert cluster.up() == set()


def test_the_ready_condition_alone_is_not_enough(cluster: ServingCluster, model: str) -> None:
    def crash(service: dict[str, Any]) -> bool:
        cluster.api.set_status(
            service,
            url="http://127.0.0.1:9",
            observedGeneration=service["metadata"]["generation"],
            conditions=[{"type": "Ready", "status": "True"}],
            modelStatus={
                "transitionStatus": "InProgress",
                "states": {"activeModelState": "Loading", "targetModelState": "Loaded"},
            },
        )
        return True

    cluster.on_service = crash
    settings = parse(
        DeploySettings, {"target": "kserve", "kserve": {"start_timeout_s": 1}}, "deploy"
    )
    with pytest.raises(UserError, match="is not ready after 1 s: Ready=True"):
        deploy(settings, registered_model=model, version="v1")
    assert cluster.up() == set()


def test_concurrent_deploys_run_one_after_the_other(cluster: ServingCluster, model: str) -> None:
    deploy(SETTINGS, registered_model=model, version="v1")
    outcomes: list[str] = []

    def promote(name: str) -> None:
        outcomes.append(deploy(SETTINGS, registered_model=model, version=name)["version"])

    threads = [threading.Thread(target=promote, args=(name,)) for name in ("v2", "v3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["v2", "v3"]
    assert (cluster.weights(), cluster.up()) == ({outcomes[-1]: 100}, {outcomes[-1]})


def test_the_holder_of_the_lease_is_named(
    cluster: ServingCluster, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nudge.components.common.clients.kube import connect

    monkeypatch.setattr(kserve, "LEASE_WAIT_S", 0.5)
    name = f"nudge-{objects.endpoint_name(model)}"
    with (
        lease.hold_lease(connect(), name, {}, 1),
        pytest.raises(UserError, match=r"/\d+/\w+ has been working on this since 20.*lease nudge-"),
    ):
        deploy(SETTINGS, registered_model=model, version="v1")
    assert cluster.api.all("InferenceService") == []


def test_after_losing_the_lease_a_shift_changes_nothing(
    cluster: ServingCluster, model: str
) -> None:
    deploy(SETTINGS, registered_model=model, version="v1")

    def take(service: dict[str, Any]) -> bool:
        (found,) = cluster.api.all("Lease")
        with cluster.api._lock:
            key = ("Lease", cluster.api.namespace, found["metadata"]["name"])
            cluster.api.objects[key]["spec"]["holderIdentity"] = "another"
            cluster.api._store(cluster.api.objects[key], bump=False)
        return False

    cluster.on_service = take
    with pytest.raises(UserError, match="another one has taken over the lease"):
        deploy(SETTINGS, registered_model=model, version="v2")
    assert cluster.weights() == {"v1": 100}


def test_a_foreign_route_is_left_alone(cluster: ServingCluster, model: str) -> None:
    theirs = routes.OpenShiftRoute(SETTINGS.kserve).body(model, {"x": 100})
    del theirs["metadata"]["annotations"]
    cluster.api._controllers.clear()
    cluster.api.add(theirs)
    with pytest.raises(UserError, match="does not belong to"):
        deploy(SETTINGS, registered_model=model, version="v1")
    assert cluster.up() == set()


def test_a_missing_kserve_is_explained(cluster: ServingCluster, model: str) -> None:
    cluster.api.forget_kind("InferenceService")
    with pytest.raises(UserError, match="no kind InferenceService.*OpenShift AI"):
        deploy(SETTINGS, registered_model=model, version="v1")


@pytest.mark.long
def test_the_commands_act_on_the_cluster(
    cluster: ServingCluster, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from nudge.pipelines.cli.main import main

    # The router of this cluster is on this machine, and a real one is not.
    monkeypatch.setattr(targets, "is_here", lambda url: False)
    recipe = tmp_path / "recipe.yaml"
    shipped = Path(services.__file__).parents[1] / "recipes" / "eiffel.yaml"
    text = shipped.read_text().replace("deploy:\n", "deploy:\n  target: kserve\n")
    recipe.write_text(text)

    def nudge(*arguments: str) -> str:
        done = CliRunner().invoke(main, [*arguments, "--model", model], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    assert f"{model}: v1 100 % at https://" in nudge("promote", "v1", "--target", "kserve")
    nudge("promote", "v2", "--recipe", str(recipe))
    assert "v2 90 %, v3 10 %" in nudge("split", "v2=90", "v3=10", "--target", "kserve")
    assert cluster.weights() == {"v2": 90, "v3": 10}
    assert "v2 100 %" in nudge("rollback", "--target", "kserve")
    assert "v1 100 %" in nudge("rollback")  # on the cluster, where it is served
    assert cluster.up() == {"v1"}
    done = CliRunner().invoke(main, ["promote", "v2", "--model", model, "--target", "local"])
    assert (done.exit_code, "which is not this machine" in done.output) == (2, True)
    assert cluster.weights() == {"v1": 100}
    monkeypatch.delenv("NUDGE_REGISTRY_URL")
    done = CliRunner().invoke(main, ["promote", "v1", "--target", "kserve"])
    assert (done.exit_code, "no model registry is known" in done.output) == (2, True)


def test_a_gateway_splits_the_traffic_on_a_cluster_without_routes(
    cluster: ServingCluster, model: str, registry: str
) -> None:
    cluster.api.forget_kind("Route")
    with pytest.raises(UserError, match=r"no kind Route.*elsewhere set deploy.kserve.gateway to a"):
        deploy(SETTINGS, registered_model=model, version="v1")
    assert cluster.up() == set()

    first = deploy(PLAIN, registered_model=model, version="v1")
    name = objects.endpoint_name(model)
    assert first["endpoint"] == f"https://{name}.models.example.com"
    served = with_registry(registry, find_served(model))
    assert served is not None
    assert served.endpoint == first["endpoint"]
    (route,) = cluster.api.all("HTTPRoute")
    assert problems(route) == []
    assert route["spec"]["hostnames"] == [f"{name}.models.example.com"]
    stream = Stream(f"https://{cluster.router.host}", model)
    try:
        deploy(PLAIN, registered_model=model, version="v2")
        stream.seen()
        assert stream.next(4) == {" v2"}
        serve(PLAIN, model, {"v2": 50, "v3": 50})
        assert cluster.weights() == {"v2": 50, "v3": 50}
        stream.seen()
        assert stream.next(12) == {" v2", " v3"}
        rollback(PLAIN, registered_model=model)
        assert (cluster.weights(), cluster.up()) == ({"v2": 100}, {"v2"})
    finally:
        stream.stop()
    assert stream.faults == []


def test_the_reason_of_a_refused_httproute_is_reported(cluster: ServingCluster, model: str) -> None:
    def refuse(route: dict[str, Any]) -> None:
        refusal = {
            "type": "Accepted", "status": "False", "reason": "NotAllowedByListeners",
            "message": "no listener takes this host", "lastTransitionTime": "2026-01-01T00:00:00Z",
            "observedGeneration": route["metadata"]["generation"],
        }  # fmt: skip
        parent = {
            "parentRef": {"name": "public"},
            "controllerName": "e.com/g",
            "conditions": [refusal],
        }
        cluster.api.set_status(route, parents=[parent])

    cluster.api.on_change("HTTPRoute", refuse)
    with pytest.raises(UserError, match="ingress/public refuses .*NotAllowedByListeners no listen"):
        deploy(PLAIN, registered_model=model, version="v1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gateway": "a/b"}, "gateway and gateway_url belong together"),
        ({"gateway": "b", "gateway_url": "https://{model}.e.com"}, "kserve.gateway"),
        ({"gateway": "a/b", "gateway_url": "https://e.com"}, "gateway_url"),
        ({"gateway": "a/b", "gateway_url": "https://{model}.e.com"}, "authentication: false"),
    ],
)
def test_an_incomplete_gateway_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(DeploySettings, {"kserve": values}, "deploy")


ALONE = parse(
    DeploySettings,
    {"target": "kserve", "smoke_prompt": SETTINGS.smoke_prompt, "kserve": {"stop_old_first": True}},
    "deploy",
)


@pytest.mark.long
def test_with_one_gpu_the_old_version_makes_room(
    cluster: ServingCluster, model: str, registry: str
) -> None:
    cluster.one_gpu = True
    endpoint = deploy(ALONE, registered_model=model, version="v1")["endpoint"]
    (made,) = cluster.api.all("InferenceService")
    assert problems(made) == []
    assert made["spec"]["predictor"]["deploymentStrategy"] == {"type": "Recreate"}
    beside = parse(DeploySettings, {"target": "kserve", "kserve": {"start_timeout_s": 1}}, "deploy")
    with pytest.raises(UserError, match="is not ready after 1 s"):
        deploy(beside, registered_model=model, version="v2")
    assert cluster.up() == {"v1"}

    stream = Stream(endpoint, model, cluster.api.token)
    try:
        stream.next(3)
        deploy(ALONE, registered_model=model, version="v2")
        stream.seen()
        assert stream.next(4) == {" v2"}
        # No one is served meanwhile: each request gets an error status, and none is cut off.
        assert stream.faults
        assert all("503" in each or "502" in each for each in stream.faults)
        assert (cluster.weights(), cluster.up()) == ({"v2": 100}, {"v2"})

        with pytest.raises(
            UserError, match="no model in s3://b/bad(.|\n)*The traffic is back on v2"
        ):
            deploy(ALONE, registered_model=model, version="bad")
        stream.seen()
        assert stream.next(4) == {" v2"}
    finally:
        stream.stop()
    assert (cluster.weights(), cluster.up()) == ({"v2": 100}, {"v2"})
    served = with_registry(registry, find_served(model))
    assert served is not None
    assert served.main == "v2"
    rollback(ALONE, registered_model=model)
    assert (cluster.weights(), cluster.up()) == ({"v1": 100}, {"v1"})


@pytest.mark.long
def test_a_running_version_needs_no_room(cluster: ServingCluster, model: str) -> None:
    deploy(SETTINGS, registered_model=model, version="v1")
    serve(SETTINGS, model, {"v1": 50, "v2": 50})
    stream = Stream(f"https://{cluster.router.host}", model, cluster.api.token)
    try:
        deploy(ALONE, registered_model=model, version="v2")
    finally:
        stream.stop()
    assert stream.faults == []
    assert cluster.up() == {"v2"}
