"""The Kubernetes client layer against the stand-in API server, over HTTP."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients import kube
from nudge.components.common.clients.kube import (
    POD,
    Cluster,
    ResourceConflict,
    ResourceKind,
    connect,
)
from nudge.components.common.clients.pods import LogTail, warnings, why, why_of
from nudge.components.common.core.errors import UserError
from nudge.components.common.preflight.serving import check_serving
from tests.kubernetes_api import KubernetesApi

MAP = ResourceKind("v1", "ConfigMap", "configmaps")
JOB = ResourceKind(
    "trainer.kubeflow.org/v1alpha1", "TrainJob", "trainjobs", needs="Kubeflow Trainer"
)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with KubernetesApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        yield api


@pytest.fixture
def cluster(api: KubernetesApi) -> Cluster:
    return connect(patience_s=3)


def config(name: str, labels: dict[str, str] | None = None, **data: str) -> dict[str, Any]:
    meta = {"name": name, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


def job(name: str, **spec: Any) -> dict[str, Any]:
    meta = {"name": name}
    body = {"runtimeRef": {"name": "torch-distributed"}, **spec}
    return {"apiVersion": JOB.api_version, "kind": JOB.name, "metadata": meta, "spec": body}


def pod(name: str, **labels: str) -> dict[str, Any]:
    containers = [{"name": "node", "image": "i"}]
    meta = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": containers}}


def test_create_get_list_patch_and_delete(cluster: Cluster) -> None:
    assert cluster.get(MAP, "a") is None
    made = cluster.create(MAP, config("a", {"app": "x", "tier": "1"}, key="1"))
    for name in ("b", "c"):
        cluster.create(MAP, config(name, {"app": "x"}))
    assert made["metadata"]["uid"]
    assert made["metadata"]["namespace"] == "project"
    with pytest.raises(ResourceConflict) as met:
        cluster.create(MAP, config("a"))
    assert met.value.reason == "AlreadyExists"
    found = cluster.list(MAP, {"app": "x"})
    assert [item["metadata"]["name"] for item in found] == ["a", "b", "c"]
    assert len(cluster.list(MAP, {"app": "x", "tier": "1"})) == 1
    assert len(cluster.list(MAP, metadata__name="b")) == 1
    changed = cluster.patch(MAP, "a", {"data": {"key": None, "other": "2"}})
    assert changed["data"] == {"other": "2"}
    assert changed["metadata"]["resourceVersion"] != made["metadata"]["resourceVersion"]
    with pytest.raises(UserError, match="no ConfigMap nowhere in namespace project"):
        cluster.patch(MAP, "nowhere", {"data": {}})
    assert not cluster.delete(MAP, "a", uid="another")
    assert cluster.delete(MAP, "a", uid=made["metadata"]["uid"])
    assert not cluster.delete(MAP, "a")


def test_long_lists_are_paged(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "PAGE", 2)
    for index in range(5):
        cluster.create(MAP, config(f"m{index}"))
    assert [each["metadata"]["name"] for each in cluster.list(MAP)] == [f"m{i}" for i in range(5)]


def test_apply_keeps_fields_of_others_and_removes_its_own_old_fields(
    api: KubernetesApi, cluster: Cluster
) -> None:
    cluster.apply(MAP, config("a", ours="1", gone="1"))
    first = api.find("ConfigMap", "a")
    assert first
    api._change(
        api.objects["ConfigMap", "project", "a"],
        {**first, "data": {**first["data"], "theirs": "2"}},
        "",
        "somebody",
    )
    made = cluster.apply(MAP, config("a", ours="3"))
    assert made["data"] == {"ours": "3", "theirs": "2"}
    with pytest.raises(UserError, match=r'conflict with "somebody": .data.theirs'):
        cluster.apply(MAP, config("a", theirs="4"))
    assert cluster.apply(MAP, config("a", theirs="4"), force=True)["data"] == {"theirs": "4"}


def test_only_spec_changes_raise_the_generation_and_status_is_separate(
    api: KubernetesApi, cluster: Cluster
) -> None:
    body = job("a", trainer={"numNodes": 1})
    made = cluster.create(JOB, {**body, "status": {"conditions": []}})
    assert "status" not in made
    assert made["spec"]["managedBy"] == "trainer.kubeflow.org/trainjob-controller"
    cluster.patch(JOB, "a", {"metadata": {"labels": {"x": "y"}}})
    assert made["metadata"]["generation"] == 1
    changed = cluster.patch(JOB, "a", {"spec": {"suspend": True}})
    assert changed["metadata"]["generation"] == 2
    now = "2026-01-01T00:00:00Z"
    state = {"type": "Suspended", "status": "True", "reason": "Q", "message": "waits"}
    api.set_status(made, conditions=[{**state, "lastTransitionTime": now}])
    found = cluster.get(JOB, "a")
    assert found
    assert kube.describe(found) == "Suspended=True Q waits"
    assert (kube.condition(found, "Suspended") or {})["status"] == "True"
    assert kube.condition(found, "Complete") is None


def test_unknown_fields_are_refused(cluster: Cluster) -> None:
    with pytest.raises(UserError, match="'numNode' was unexpected"):
        cluster.create(JOB, job("a", trainer={"numNode": 2}))
    with pytest.raises(UserError, match=r"spec.containers.0.name: is required"):
        cluster.create(POD, {**pod("p"), "spec": {"containers": [{"image": "i"}]}})


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_retried(api: KubernetesApi, cluster: Cluster, status: int) -> None:
    api.fail_next(status, times=2, Retry_After="0")
    cluster.create(MAP, config("a"))
    assert [verb for verb, *_ in api.requests] == ["create"] * 3


def test_the_error_of_a_server_that_stays_busy_has_its_message(
    api: KubernetesApi, cluster: Cluster
) -> None:
    cluster.requests.patience_s = 0.5
    api.fail_next(503, times=100)
    with pytest.raises(UserError, match=r"get ConfigMap a .* answered 503: the server is not well"):
        cluster.get(MAP, "a")


def test_a_retry_after_a_lost_answer_finds_the_object(api: KubernetesApi, cluster: Cluster) -> None:
    """The object was created although the answer was lost, so the retry meets a conflict."""
    api.lose_next(verb="create")
    with pytest.raises(ResourceConflict) as met:
        cluster.create(MAP, config("a"))
    assert met.value.reason == "AlreadyExists"
    api.lose_next(verb="get")
    assert cluster.get(MAP, "a")


def test_an_unreachable_server(api: KubernetesApi, cluster: Cluster) -> None:
    cluster.requests.patience_s = 0.3
    api.__exit__()
    with pytest.raises(
        UserError, match=r"list ConfigMap in .*: the cluster http.* does not answer"
    ):
        cluster.list(MAP)


def test_a_missing_permission_names_the_rule_that_grants_it(
    api: KubernetesApi, cluster: Cluster
) -> None:
    api.forbid("create", "trainjobs")
    api.forbid("get", "pods/log")
    with pytest.raises(UserError) as error:
        cluster.create(JOB, job("a"))
    assert 'cannot create resource "trainjobs"' in str(error.value)
    rule = (
        '{"apiGroups": ["trainer.kubeflow.org"], "resources": ["trainjobs"], "verbs": ["create"]}'
    )
    assert rule in str(error.value)
    api.add(pod("p"))
    with pytest.raises(UserError) as error:
        cluster.log("p")
    assert '{"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]}' in str(error.value)


def test_tokens_never_appear_in_messages_or_logs(
    api: KubernetesApi, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    cluster.create(MAP, config("a"))
    token, api.token = api.token, "another"
    with pytest.raises(UserError, match=r"get ConfigMap a .*does not accept this token \(401\)"):
        cluster.get(MAP, "a")
    cluster.requests.patience_s = 0.2
    api.__exit__()
    with pytest.raises(UserError) as error:
        cluster.get(MAP, "a")
    shown = f"{error.value}{caplog.text}{cluster!r}{vars(cluster)!r}{vars(cluster.requests)!r}"
    assert token not in shown


def test_a_kind_that_the_cluster_does_not_have(api: KubernetesApi, cluster: Cluster) -> None:
    assert cluster.schema(JOB)
    api.forget_kind("TrainJob")
    assert cluster.schema(JOB) is None
    with pytest.raises(UserError, match="no kind TrainJob .*it comes with Kubeflow Trainer"):
        cluster.get(JOB, "a")


def test_polling_returns_the_judgment_or_raises_the_cause(
    api: KubernetesApi, cluster: Cluster
) -> None:
    threading.Timer(0.3, lambda: api.add(config("a", key="ready"))).start()
    judged = cluster.poll(
        MAP, "a", lambda found: found and found["data"]["key"], timeout_s=20, interval_s=0.05
    )
    assert judged == "ready"
    with pytest.raises(
        UserError, match="ConfigMap b .* is not ready after 0.2 s: it does not exist"
    ):
        cluster.poll(MAP, "b", lambda found: found, timeout_s=0.2, interval_s=0.05)


def test_deleting_an_object_deletes_what_it_owns(api: KubernetesApi, cluster: Cluster) -> None:
    owner = cluster.create(MAP, config("a"))
    owned = config("b")
    owned["metadata"]["ownerReferences"] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": "a", "uid": owner["metadata"]["uid"]}
    ]
    cluster.create(MAP, owned)
    assert cluster.delete(MAP, "a")
    assert cluster.get(MAP, "b") is None


def test_each_line_of_a_log_is_returned_once(api: KubernetesApi, cluster: Cluster) -> None:
    tail = LogTail(cluster, "p", "node")
    assert tail.lines() == []
    api.add(pod("p"))
    assert tail.lines() == []
    api.write_log("p", "node", "one", "two", "two")
    assert tail.lines() == ["one", "two", "two"]
    assert tail.lines() == []
    api.write_log("p", "node", "", "three")
    api.lose_next(verb="get")
    assert tail.lines() == ["", "three"]


def ended(code: int, at: str, reason: str = "Error") -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "reason": reason, "finishedAt": at}}
    common = {"image": "i", "imageID": "", "ready": False, "restartCount": 0}
    return {"containerStatuses": [{"name": "node", "state": state, **common}]}


def test_the_cause_is_the_first_pod_that_failed(api: KubernetesApi, cluster: Cluster) -> None:
    labels = {"job": "a"}
    api.add(pod("p0", **labels), **ended(1, "2026-01-01T00:00:09Z"))
    api.add(pod("p1", **labels), **ended(137, "2026-01-01T00:00:01Z", "OOMKilled"))
    waits = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    status = ended(0, "")["containerStatuses"][0] | {"state": waits}
    stuck = api.add(pod("p2", **labels), containerStatuses=[status])
    for name, line in (("p0", "peer is gone"), ("p1", "loss 3.1"), ("p2", "")):
        api.write_log(name, "node", line)
    api.warn(stuck, "Failed", "no such image")
    cause = why(cluster, labels)
    assert "pod p1, container node: ended with OOMKilled, status 137; it needs more memory" in cause
    assert "pod p2, container node: waits: ImagePullBackOff not found" in cause
    assert "Pod p2: Failed: no such image" in cause
    assert "the end of the log of pod p1:\n  loss 3.1" in cause
    assert "peer is gone" not in cause
    api.forbid("list", "events")
    assert warnings(cluster, stuck) == []
    assert "OOMKilled" in why(cluster, labels)


def test_no_cluster_and_no_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no cluster is known here"):
        connect()
    api = KubernetesApi()
    api.url = "http://127.0.0.1:1"
    path = api.kubeconfig(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(path))
    path.write_text(path.read_text().replace("namespace:", "user:"))
    with pytest.raises(UserError, match="no namespace is known"):
        connect()
    assert connect("another").namespace == "another"


def test_a_log_that_cannot_be_read_costs_seconds(api: KubernetesApi) -> None:
    """While a kubelet is away, the API server answers 500 to every request for a log."""
    cluster = connect()
    api.add(pod("p"), **ended(1, "2026-01-01T00:00:09Z"))
    api.write_log("p", "node", "never read")
    api.fail_next(500, verb="get", resource="pods", times=1000)
    began = time.monotonic()
    cause = why_of(cluster, api.all("Pod"))
    assert time.monotonic() - began < 20
    assert "container node: ended with Error, status 1" in cause
    with pytest.raises(UserError, match="answered 500"):
        cluster.log("p", "node")


def test_routine_and_resolved_warnings_are_not_causes(api: KubernetesApi, cluster: Cluster) -> None:
    running = {"state": {"running": {}}, "image": "i", "imageID": "", "restartCount": 0}
    running_pod = api.add(pod("p"), containerStatuses=[{"name": "node", "ready": True, **running}])
    waiting_pod = api.add(pod("q"))
    for each in (running_pod, waiting_pod):
        for reason in ("VirtualServiceCRDNotFound", "UpdateFailed", "FailedMount", "Unhealthy"):
            api.warn(each, reason, f"of {each['metadata']['name']}")
    cause = why_of(cluster, [running_pod, waiting_pod], None)
    assert "VirtualServiceCRDNotFound" not in cause
    assert "UpdateFailed" not in cause
    assert "FailedMount: of p" not in cause  # the mount succeeded later
    assert "FailedMount: of q" in cause
    assert "Unhealthy: of p" in cause


def test_a_failure_from_which_a_container_recovered_is_not_a_cause(
    api: KubernetesApi, cluster: Cluster
) -> None:
    (status,) = ended(1, "2026-01-01T00:00:09Z")["containerStatuses"]
    back = {**status, "lastState": status["state"], "state": {"running": {}}, "ready": True}
    assert why_of(cluster, [api.add(pod("p"), containerStatuses=[back])]) == ""
    still = {**back, "ready": False}
    assert "status 1" in why_of(cluster, [api.add(pod("q"), containerStatuses=[still])])


def test_a_cluster_that_cannot_serve_is_reported_before_training(
    api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.act_as("runner", "nudge-runner")
    check_serving(patience_s=3)
    api.act_as("author", "nudge-author")
    with pytest.raises(UserError, match=r"may not create inferenceservices, patch .* in the names"):
        check_serving(patience_s=3)
    monkeypatch.setattr(api, "_kinds", {("pods", "v1"): ("v1", "Pod")})
    with pytest.raises(UserError, match="this cluster has no KServe"):
        check_serving(patience_s=3)
