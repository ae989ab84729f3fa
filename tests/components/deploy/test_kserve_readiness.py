"""Readiness on KServe comes from the pods, and failures are reported when they happen.

The statuses are recordings of KServe (see `kserve_pods`).
"""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from nudge.components.common.clients.kube import connect
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.deploy.kserve import kserve, lifecycle, objects, readiness, routes
from nudge.components.deploy.kserve.kserve import KServe
from nudge.components.deploy.settings import DeploySettings
from tests.components.deploy import kserve_pods as pods
from tests.components.deploy.kserve_cluster import SETTINGS, ServingCluster

MODEL = "m"
FAST_S = 15.0
"""The time limit for reporting a failure here, where polls are quick; the settings' default is
half an hour."""


def version(name: str = "v1") -> Version:
    return Version(MODEL, name, "1", "2", f"s3://bucket/models/m/{name}", False, 0, {})


def settings(**values: Any) -> DeploySettings:
    return parse(DeploySettings, {"target": "kserve", "kserve": values}, "deploy")


def bring_up(settings: DeploySettings = SETTINGS, name: str = "v1") -> str:
    target = KServe(connect(), settings)
    with target.exclusive(MODEL):
        return target.bring_up(version(name)).address


def refused(settings: DeploySettings = SETTINGS, name: str = "v1") -> str:
    """The error of a start that fails; it must be reported soon."""
    began = time.monotonic()
    # The limit only ends a test that fails: without a report, the start would wait half an hour.
    kserve_settings = replace(settings.kserve, start_timeout_s=int(2 * FAST_S))
    with pytest.raises(UserError) as error:
        bring_up(replace(settings, kserve=kserve_settings), name)
    assert time.monotonic() - began < FAST_S, "reported late"
    return str(error.value)


def running(cluster: ServingCluster) -> dict[str, int]:
    """The number of pods by the digest of their settings."""
    counts: dict[str, int] = {}
    for pod in cluster.api.all("Pod"):
        digest = readiness.digest_of(pod) or ""
        counts[digest] = counts.get(digest, 0) + 1
    return counts


def digest(settings: DeploySettings) -> str:
    service = objects.inference_service(version(), settings)
    return str(service["metadata"]["annotations"][objects.SETTINGS])


def test_the_recorded_status_says_ready_while_an_update_crashes() -> None:
    """An older nudge relied on these: the generation, Ready and the model's state."""
    for case in ("update-stuck", "update-stuck-later"):
        last = pods.recorded(case)[-1]
        assert last["obs"] >= last["gen"]
        assert last["cond"]["Ready"] == "True"
        assert last["model"]["transitionStatus"] == "UpToDate"
    (*_, started) = pods.recorded("start")
    assert started["cond"]["Ready"] == "True"
    assert started["obs"] < started["gen"]


def test_a_failure_is_reported_within_twenty_seconds() -> None:
    """A failure counts once it has lasted, or when the pods say so, which costs two polls."""
    assert lifecycle.SUSPECT_S + 2 * kserve.POLL_S <= 20


def test_an_update_is_ready_when_only_its_pods_run(cluster: ServingCluster) -> None:
    bring_up()
    cluster.notices_after_s = 0.7  # until then the old pod alone runs, and is Ready
    changed = settings(arguments=["--max-model-len=4096"])
    bring_up(changed)
    assert running(cluster) == {digest(changed): 1}


def test_a_changed_label_is_waited_for(
    cluster: ServingCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It creates new pods, but no new generation of the InferenceService."""
    bring_up()
    cluster.notices_after_s = 0.7
    changed = replace(SETTINGS, registry_name="another")
    played: list[str] = []
    report = cluster._report

    def note(service: dict[str, Any], case: str, **how: Any) -> None:
        played.append(case)
        report(service, case, **how)

    monkeypatch.setattr(cluster, "_report", note)
    bring_up(changed)
    assert "label" in played  # as recorded, where Ready stays True
    assert "update" not in played
    (service,) = cluster.api.all("InferenceService")
    assert service["metadata"]["generation"] == 1
    assert running(cluster) == {digest(changed): 1}


def test_a_changed_number_of_replicas_is_waited_for(cluster: ServingCluster) -> None:
    """Also before the controllers notice it, when the pods that run are Ready and current."""
    bring_up()
    cluster.notices_after_s = 0.7
    three = settings(replicas=3)
    assert digest(three) == digest(settings())  # serving pods are not replaced for it
    bring_up(three)
    assert running(cluster) == {digest(three): 3}
    bring_up(settings(replicas=2))
    assert running(cluster) == {digest(three): 2}


def test_an_unschedulable_replica_is_not_ready(
    cluster: ServingCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    bring_up()
    cluster.new_pods = "unschedulable"
    with pytest.raises(
        UserError, match=r"not ready after 2 s(.|\n)*3 Insufficient nvidia.com/gpu"
    ) as error:
        bring_up(settings(replicas=2, start_timeout_s=2))
    # Events of the pods do not hide the conditions of the InferenceService.
    assert "PredictorReady=" in str(error.value)
    shown = capfd.readouterr().err
    assert shown.count("is not scheduled: 0/3 nodes are available: 3 Insufficient") == 1


def test_a_crash_on_update_is_a_failure(cluster: ServingCluster) -> None:
    bring_up()
    cluster.new_pods = "crash"
    error = refused(settings(arguments=["--max-model-len=8192"]))
    (service,) = cluster.api.all("InferenceService")
    ready = {each["type"]: each["status"] for each in service["status"]["conditions"]}["Ready"]
    assert ready == "True"
    assert "container kserve-container: waits: CrashLoopBackOff" in error
    assert "the end of the log of pod m-v1-" in error
    assert pods.CRASH_LOG in error
    assert "The pods with the previous settings are still serving" in error
    for routine in ("VirtualServiceCRDNotFound", "UpdateFailed", "FailedMount"):
        assert routine not in error


def test_a_missing_image_on_update_is_a_failure(cluster: ServingCluster) -> None:
    bring_up()
    cluster.new_pods = "missing"
    error = refused(settings(arguments=["--max-model-len=8192"]))
    assert "ImagePullBackOff" in error
    assert pods.NOT_FOUND in error


def test_a_first_start_that_crashes_is_a_failure(cluster: ServingCluster) -> None:
    """KServe's status stays InProgress: it watches init containers only."""
    cluster.new_pods = "crash"
    error = refused()
    assert pods.CRASH_LOG in error
    assert "still serving" not in error


def test_a_failed_version_is_recreated(cluster: ServingCluster) -> None:
    cluster.new_pods = "crash"
    refused()
    (failed,) = cluster.api.all("InferenceService")
    cluster.new_pods = "ready"
    bring_up()
    (service,) = cluster.api.all("InferenceService")
    assert service["metadata"]["uid"] != failed["metadata"]["uid"]


def test_an_unknown_runtime_is_a_failure_without_a_generation(cluster: ServingCluster) -> None:
    error = refused(settings(runtime="nowhere"))
    assert "RuntimeNotRecognized Waiting for runtime to become available (runtime nowhere)" in error
    (service,) = cluster.api.all("InferenceService")
    assert "observedGeneration" not in service["status"]


@pytest.mark.parametrize(
    ("cause", "hint"),
    [
        ('pods "p" is forbidden: exceeded quota: gpus, requested: 1, used: 4, limited: 4', ""),
        ('admission webhook "policy" denied the request: no label team', ""),
        (
            'pods "p" is forbidden: violates PodSecurity "restricted:latest": '
            'allowPrivilegeEscalation != false (container "storage-initializer")',
            "kubectl label namespace project --overwrite "
            "pod-security.kubernetes.io/enforce=baseline",
        ),
    ],
)
def test_pods_that_cannot_be_created_are_a_failure(
    cluster: ServingCluster, cause: str, hint: str
) -> None:
    cluster.refused = cause
    error = refused()
    assert f"its pods cannot be created: FailedCreate: {cause}" in error
    assert hint in error


def test_a_quota_that_terminating_pods_use_is_waited_for(
    cluster: ServingCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    bring_up(name="v2")
    (old,) = cluster.api.all("Pod")
    with cluster.api._lock:
        key = ("Pod", cluster.api.namespace, old["metadata"]["name"])
        cluster.api.objects[key]["metadata"]["deletionTimestamp"] = "2026-11-30T10:00:00Z"
    cluster.refused = "exceeded quota: gpus"
    with pytest.raises(UserError, match="is not ready after 3 s(.|\n)*exceeded quota: gpus"):
        bring_up(settings(start_timeout_s=3))
    assert "exceeded quota: gpus; pods that use it are still terminating" in capfd.readouterr().err


def test_a_missing_permission_hides_no_other_cause(cluster: ServingCluster) -> None:
    cluster.api.forbid("list", "replicasets")
    cluster.api.forbid("list", "events")
    cluster.new_pods = "crash"
    assert "CrashLoopBackOff" in refused()


def test_a_stopped_version_is_started_and_announced(
    cluster: ServingCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    bring_up()
    (service,) = cluster.api.all("InferenceService")
    service["metadata"]["annotations"][objects.STOP] = "true"
    with cluster.api._lock:
        key = ("InferenceService", cluster.api.namespace, service["metadata"]["name"])
        cluster.api._change(cluster.api.objects[key], service, "", "dashboard")
    deadline = time.monotonic() + 20
    while cluster.api.all("Pod") and time.monotonic() < deadline:
        time.sleep(0.05)
    bring_up()
    (service,) = cluster.api.all("InferenceService")
    assert objects.STOP not in service["metadata"]["annotations"]
    assert running(cluster) == {digest(SETTINGS): 1}
    assert "someone had stopped m v1" in capfd.readouterr().err


def test_a_failure_of_the_previous_pods_passes(
    cluster: ServingCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded after a restart: BlockedByFailedLoad for 0.2 s, because of the previous pod."""
    blocked = [row for row in pods.recorded("failed-load-passing") if _is_blocked(row)]
    assert blocked
    played = threading.Event()
    roll_out = cluster._roll_out

    def slowly(service: dict[str, Any], case: str) -> None:
        owner = cluster.api.add(pods.replica_set(service))
        cluster.api.add(pods.pod(owner, 0), **pods.pod_status("no-model"))
        cluster.api.set_status(service, **pods.status(blocked[0], 1, "127.0.0.1:9", {}))
        time.sleep(0.3)
        cluster._end_pods(service)
        played.set()
        roll_out(service, case)

    monkeypatch.setattr(cluster, "_roll_out", slowly)
    bring_up()
    assert played.is_set()


def _is_blocked(row: dict[str, Any]) -> bool:
    return bool((row["model"] or {}).get("transitionStatus") == "BlockedByFailedLoad")


def test_ready_pods_behind_an_unreachable_address_are_not_ready(
    cluster: ServingCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "ROUTER_S", 1.0)
    bring_up()
    (model,) = cluster.models.values()
    model.kill()
    error = refused()
    assert f"its pods are ready, but http://{model.address} does not answer" in error


def test_evicted_and_terminating_pods_are_ignored(cluster: ServingCluster) -> None:
    bring_up()
    (owner,) = cluster.api.all("ReplicaSet")
    evicted = cluster.api.add(pods.pod(owner, 7))
    cluster.api.set_status(evicted, phase="Failed", reason="Evicted")
    ending = pods.pod(owner, 8)
    ending["metadata"]["deletionTimestamp"] = "2026-11-30T10:00:00Z"
    cluster.api.add(ending, **pods.pod_status("ready"))
    bring_up()


def test_an_older_pod_that_still_runs_prevents_readiness(cluster: ServingCluster) -> None:
    bring_up()
    (owner,) = cluster.api.all("ReplicaSet")
    older = pods.pod(owner, 9)
    older["metadata"]["annotations"] = {objects.SETTINGS: "older"}
    cluster.api.add(older, **pods.pod_status("ready"))
    with pytest.raises(UserError, match="is not ready after 1 s"):
        bring_up(settings(start_timeout_s=1))
