"""Readiness on KServe comes from the pods, and failures are reported when they happen.

The statuses were recorded from KServe (see `kserve_pods`).
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
from nudge.components.deploy.kserve import kserve, readiness
from nudge.components.deploy.kserve import objects as objects
from nudge.components.deploy.kserve.kserve import KServe
from nudge.components.deploy.settings import DeploySettings
from tests.components.deploy import kserve_pods as pods
from tests.components.deploy.kserve_cluster import SETTINGS, ServingCluster

MODEL = "m"
FAST_S = 15.0
"""The longest that a failure may take to be reported here, where polls are quick; the settings' own
limit is half an hour."""


def version(name: str = "v1") -> Version:
    return Version(MODEL, name, "1", "2", f"s3://bucket/models/m/{name}", False, 0, {})


def settings(**values: Any) -> DeploySettings:
    return parse(DeploySettings, {"target": "kserve", "kserve": values}, "deploy")


def bring_up(given: DeploySettings = SETTINGS, name: str = "v1") -> str:
    target = KServe(connect(), given)
    with target.exclusive(MODEL):
        return target.bring_up(version(name)).address


def refused(given: DeploySettings = SETTINGS, name: str = "v1") -> str:
    """The error of a start that fails; it must come soon."""
    began = time.monotonic()
    with pytest.raises(UserError) as told:
        bring_up(given, name)
    assert time.monotonic() - began < FAST_S, "reported late"
    return str(told.value)


def running(cluster: ServingCluster) -> dict[str, int]:
    """How many pods there are by the digest of their settings."""
    counts: dict[str, int] = {}
    for pod in cluster.api.all("Pod"):
        digest = readiness.digest_of(pod) or ""
        counts[digest] = counts.get(digest, 0) + 1
    return counts


def digest(given: DeploySettings) -> str:
    made = objects.inference_service(version(), given)
    return str(made["metadata"]["annotations"][objects.SETTINGS])


def test_the_recorded_status_says_ready_while_an_update_crashes() -> None:
    """What nudge went by before: the generation, Ready and the model's state."""
    last = pods.recorded("update-stuck")[-1]
    assert last["obs"] >= last["gen"]
    assert last["cond"]["Ready"] == "True"
    assert last["model"]["transitionStatus"] == "UpToDate"
    (*_, started) = pods.recorded("start")
    assert started["cond"]["Ready"] == "True"
    assert started["obs"] < started["gen"]


def test_an_update_is_ready_when_only_its_own_pods_run(cluster: ServingCluster) -> None:
    bring_up()
    changed = settings(arguments=["--max-model-len=4096"])
    bring_up(changed)
    assert running(cluster) == {digest(changed): 1}


def test_a_changed_label_is_waited_for(cluster: ServingCluster) -> None:
    """No new generation of the InferenceService, yet new pods."""
    bring_up()
    changed = replace(SETTINGS, registry_name="another")
    bring_up(changed)
    (service,) = cluster.api.all("InferenceService")
    assert service["metadata"]["generation"] == 1
    assert running(cluster) == {digest(changed): 1}


def test_a_changed_number_of_replicas_is_waited_for(cluster: ServingCluster) -> None:
    bring_up()
    three = settings(replicas=3)
    assert digest(three) == digest(settings())  # pods that serve are not replaced for it
    bring_up(three)
    assert running(cluster) == {digest(three): 3}
    bring_up(settings(replicas=2))
    assert running(cluster) == {digest(three): 2}


def test_a_replica_that_finds_no_node_is_not_ready(
    cluster: ServingCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    bring_up()
    cluster.new_pods = "unschedulable"
    with pytest.raises(UserError, match=r"not ready after 2 s(.|\n)*3 Insufficient nvidia.com/gpu"):
        bring_up(settings(replicas=2, start_timeout_s=2))
    shown = capfd.readouterr().err
    assert shown.count("is not scheduled: 0/3 nodes are available: 3 Insufficient") == 1


def test_a_crash_on_update_is_a_failure(cluster: ServingCluster) -> None:
    bring_up()
    cluster.new_pods = "crash"
    told = refused(settings(arguments=["--max-model-len=8192"]))
    (service,) = cluster.api.all("InferenceService")
    ready = {each["type"]: each["status"] for each in service["status"]["conditions"]}["Ready"]
    assert ready == "True"
    assert "container kserve-container: waits: CrashLoopBackOff" in told
    assert "the end of the log of pod m-v1-" in told
    assert pods.CRASH_LOG in told
    assert "The pods with the earlier settings still serve" in told
    for routine in ("VirtualServiceCRDNotFound", "UpdateFailed", "FailedMount"):
        assert routine not in told


def test_a_missing_image_on_update_is_a_failure(cluster: ServingCluster) -> None:
    bring_up()
    cluster.new_pods = "missing"
    told = refused(settings(arguments=["--max-model-len=8192"]))
    assert "ImagePullBackOff" in told
    assert pods.NOT_FOUND in told


def test_a_first_start_that_crashes_is_a_failure(cluster: ServingCluster) -> None:
    """KServe's status stays InProgress: it watches init containers only."""
    cluster.new_pods = "crash"
    told = refused()
    assert pods.CRASH_LOG in told
    assert "still serve" not in told


def test_a_version_that_failed_is_started_afresh(cluster: ServingCluster) -> None:
    cluster.new_pods = "crash"
    refused()
    (failed,) = cluster.api.all("InferenceService")
    cluster.new_pods = "ready"
    bring_up()
    (service,) = cluster.api.all("InferenceService")
    assert service["metadata"]["uid"] != failed["metadata"]["uid"]


def test_an_unknown_runtime_is_a_failure_without_a_generation(cluster: ServingCluster) -> None:
    told = refused(settings(runtime="nowhere"))
    assert "RuntimeNotRecognized Waiting for runtime to become available (runtime nowhere)" in told
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
    told = refused()
    assert f"its pods cannot be created: FailedCreate: {cause}" in told
    assert hint in told


def test_a_quota_that_pods_of_the_model_still_use_is_waited_for(
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
    assert "exceeded quota: gpus; pods that use it are still ending" in capfd.readouterr().err


def test_a_missing_right_hides_no_other_cause(cluster: ServingCluster) -> None:
    cluster.api.forbid("list", "replicasets")
    cluster.api.forbid("list", "events")
    cluster.new_pods = "crash"
    assert "CrashLoopBackOff" in refused()


def test_a_stopped_version_is_started_and_said_so(
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
    assert "m v1 had been stopped by somebody" in capfd.readouterr().err


def test_a_failure_of_what_was_there_before_passes(
    cluster: ServingCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded after a restart: BlockedByFailedLoad for 0.2 s, because of the pod before."""
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


def test_ready_pods_behind_a_silent_address_are_not_ready(
    cluster: ServingCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kserve, "ROUTER_S", 1.0)
    bring_up()
    (model,) = cluster.models.values()
    model.kill()
    told = refused()
    assert f"its pods are ready, but http://{model.address} does not answer" in told


def test_a_pod_that_was_evicted_or_is_ending_counts_for_nothing(cluster: ServingCluster) -> None:
    bring_up()
    (owner,) = cluster.api.all("ReplicaSet")
    evicted = cluster.api.add(pods.pod(owner, 7))
    cluster.api.set_status(evicted, phase="Failed", reason="Evicted")
    ending = pods.pod(owner, 8)
    ending["metadata"]["deletionTimestamp"] = "2026-11-30T10:00:00Z"
    cluster.api.add(ending, **pods.pod_status("ready"))
    bring_up()


def test_an_older_pod_that_still_runs_counts(cluster: ServingCluster) -> None:
    bring_up()
    (owner,) = cluster.api.all("ReplicaSet")
    older = pods.pod(owner, 9)
    older["metadata"]["annotations"] = {objects.SETTINGS: "older"}
    cluster.api.add(older, **pods.pod_status("ready"))
    with pytest.raises(UserError, match="is not ready after 1 s"):
        bring_up(settings(start_timeout_s=1))
