"""Following a job: its failures, restarts and pods, and a cluster that is out of sight."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.kube import Cluster, connect
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.progress import progress
from nudge.components.common.spending.budget import OverBudget
from nudge.components.train.cluster import following, rayjob, trainjob
from nudge.components.train.cluster.following import Follower
from nudge.components.train.cluster.jobs import Engine, Step, job_name
from nudge.components.train.settings import LaunchSettings
from tests.components.train.cluster.recorded_jobs import (
    add_pod,
    changes,
    container_status,
    set_recorded,
    terminated,
)
from tests.kubernetes_api import KubernetesApi
from tests.kubernetes_schemas import definition, schema

NAME = job_name("run-1")
SENTENCE = "s3://nudge/models/none: there is nothing"
BANNER = """\
E1130 10:49:13.100000 7 torch/distributed/elastic/multiprocessing/api.py:874] failed (exitcode: 1) \
local_rank: 0 (pid: 34) of binary: /opt/nudge/bin/python
Traceback (most recent call last):
  File "/opt/nudge/lib/python3.11/site-packages/torch/distributed/run.py", line 892, in main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
nudge.components.train FAILED
------------------------------------------------------------
Root Cause (first observed failure):
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 34)
============================================================"""


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.setattr(following, "POLL_S", 0.02)
    with KubernetesApi(role="nudge-runner") as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        yield api


def new_job(api: KubernetesApi, engine: Engine, settings: LaunchSettings) -> dict[str, Any]:
    found = definition({"apiVersion": engine.KIND.api_version, "kind": engine.KIND.name})
    assert found
    known = schema(found)
    body = engine.body(settings, name=NAME, handover="/h", schema=known, step=Step("i"))
    return api.add(body)


def labels_of_pod(engine: Engine) -> dict[str, str]:
    return {**engine.pods(NAME), **engine.LOG[0]}


def follow(
    job: dict[str, Any],
    engine: Engine = trainjob,
    settings: LaunchSettings | None = None,
    cluster: Cluster | None = None,
) -> None:
    settings = settings or LaunchSettings(deadline_hours=0.01)
    with progress("train", unit="steps") as bar:
        Follower(cluster or connect(), engine, job, settings, bar).follow()


def completes(api: KubernetesApi, job: dict[str, Any], after_s: float) -> threading.Thread:
    """Let a TrainJob be complete after a while, with the recorded status."""

    def work() -> None:
        time.sleep(after_s)
        set_recorded(api, job, changes("trainjobs", "nudge-d1-8b53639f")[-1])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def running(api: KubernetesApi, name: str = "pod-0", **status: Any) -> dict[str, Any]:
    return add_pod(api, name, labels_of_pod(trainjob), "node", **status)


PERMANENT = [
    ({"state": terminated(137, "OOMKilled")}, "ended with OOMKilled, status 137"),
    ({"state": terminated(2, message=f"error: {SENTENCE}")}, f"status 2: {SENTENCE}"),
    # The runtime of the cluster restarts the container; the cause is in its last state.
    (
        {"restarts": 1, "state": {"running": {}}, "lastState": terminated(137, "OOMKilled")},
        "ended with OOMKilled, status 137",
    ),
]


@pytest.mark.parametrize(("states", "cause"), PERMANENT)
def test_a_permanent_failure_stops_at_the_first_attempt(
    api: KubernetesApi, states: dict[str, Any], cause: str
) -> None:
    """The job's own status still reports that it runs."""
    job = new_job(api, trainjob, LaunchSettings())
    set_recorded(api, job, changes("trainjobs", "nudge-c3-7c1c97df")[3])
    running(api, containerStatuses=[container_status("node", **states)])
    with pytest.raises(UserError, match=cause) as raised:
        follow(job)
    assert not isinstance(raised.value, Transient)
    assert api.find("TrainJob", NAME) is None


def test_a_failure_that_may_pass_is_transient_and_its_cause_has_no_banner(
    api: KubernetesApi,
) -> None:
    job = new_job(api, trainjob, LaunchSettings())
    set_recorded(api, job, changes("trainjobs", "nudge-c3-7c1c97df")[-1])
    running(api, containerStatuses=[container_status("node", state=terminated(1))])
    api.write_log("pod-0", "node", "NCCL error: remote process exited", *BANNER.splitlines())
    with pytest.raises(Transient) as raised:
        follow(job)
    text = str(raised.value)
    assert "FailedJobs" in text
    assert "NCCL error: remote process exited" in text
    assert "ChildFailedError" not in text
    assert "local_rank" not in text


@pytest.mark.parametrize("code", [75, 2])
def test_our_own_transient_error_is_transient(api: KubernetesApi, code: int) -> None:
    job = new_job(api, trainjob, LaunchSettings())
    set_recorded(api, job, changes("trainjobs", "nudge-c3-7c1c97df")[-1])
    end = terminated(code, message="failed: the object store does not answer")
    running(api, containerStatuses=[container_status("node", state=end)])
    with pytest.raises(Transient, match="the object store does not answer"):
        follow(job)


def test_a_pod_that_the_cluster_moves_away_is_no_permanent_failure(api: KubernetesApi) -> None:
    job = new_job(api, trainjob, LaunchSettings())
    moved = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    statuses = [container_status("node", state=terminated(137, "OOMKilled"))]
    running(api, conditions=[moved], containerStatuses=statuses)
    completes(api, job, 0.5).join(0)
    follow(job)


@pytest.mark.parametrize("kind", [UserError, OverBudget])
def test_a_rayjob_fails_with_the_sentence_of_its_driver(
    api: KubernetesApi, kind: type[UserError]
) -> None:
    recorded = changes("rayjobs", "nudge-e6-f33422b9")
    (failed,) = [each for each in recorded if each.get("jobDeploymentStatus") == "Failed"][:1]
    job = new_job(api, rayjob, LaunchSettings())
    message = failed["message"].replace("exit code 2", f"exit code {kind.status}")
    set_recorded(api, job, {**failed, "message": message})
    with pytest.raises(UserError, match=f"failed: (over budget: )?{SENTENCE}") as raised:
        follow(job, rayjob)
    assert type(raised.value) is kind
    said = f"AppFailed Job entrypoint command failed with exit code {kind.status}"
    assert said in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_a_recorded_rayjob_is_followed_to_its_end(api: KubernetesApi) -> None:
    job = new_job(api, rayjob, LaunchSettings())

    def play() -> None:
        for status in changes("rayjobs", "nudge-e4-44977712"):
            set_recorded(api, job, status)
            time.sleep(0.05)

    threading.Thread(target=play, daemon=True).start()
    follow(job, rayjob)


def test_restarts_and_pods_that_cannot_start_are_reported_while_they_happen(
    api: KubernetesApi, capfd: pytest.CaptureFixture[str]
) -> None:
    job = new_job(api, trainjob, LaunchSettings())
    waits = {"waiting": {"reason": "ErrImagePull", "message": "manifest unknown"}}
    running(api, containerStatuses=[container_status("node", state=waits)])
    unfit = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    running(api, "pod-1", conditions=[{**unfit, "message": "0/3 nodes: Insufficient cpu."}])
    ended = {"state": {"running": {}}, "lastState": terminated(143)}
    running(api, "pod-2", containerStatuses=[container_status("node", 2, **ended)])
    completes(api, job, 0.6)
    follow(job)
    printed = capfd.readouterr().err
    for line in (
        "pod pod-0, container node: waits: ErrImagePull manifest unknown",
        "pod pod-1 is not scheduled: 0/3 nodes: Insufficient cpu.",
        "pod pod-2, container node: restarted 2 times: ended with Error, status 143",
    ):
        assert printed.count(line) == 1


def test_a_log_that_cannot_be_read_does_not_end_the_step(
    api: KubernetesApi, capfd: pytest.CaptureFixture[str]
) -> None:
    job = new_job(api, trainjob, LaunchSettings())
    running(api)
    api.forbid("get", "pods/log")
    completes(api, job, 0.5)
    follow(job)
    assert capfd.readouterr().err.count("cannot read the log of pod pod-0") == 1


def test_a_cluster_out_of_sight_does_not_end_the_step(
    api: KubernetesApi, capfd: pytest.CaptureFixture[str]
) -> None:
    job = new_job(api, trainjob, LaunchSettings())
    api.fail_next(503, resource="trainjobs", times=6)
    api.fail_next(401, resource="pods", times=2)
    completes(api, job, 0.3)
    follow(job, cluster=connect(patience_s=0.05))
    printed = capfd.readouterr().err
    assert printed.count("cannot see the job, which keeps running") == 1
    assert printed.count("cannot read the job's pods") == 1
    assert api.find("TrainJob", NAME)


def test_the_log_of_a_new_pod_is_followed(
    api: KubernetesApi, capfd: pytest.CaptureFixture[str]
) -> None:
    """The pod of a replaced node is still listed; so is that of an earlier job of this name."""
    earlier = running(api, "earlier")
    api.objects["Pod", api.namespace, "earlier"]["metadata"]["creationTimestamp"] = (
        "2026-01-01T00:00:00Z"
    )
    assert earlier
    api.write_log("earlier", "node", "a line of the earlier job")
    job = new_job(api, trainjob, LaunchSettings())
    running(api, "first")
    api.write_log("first", "node", "a line of the first pod")

    def replace() -> None:
        time.sleep(1.2)  # creation times are of full seconds
        running(api, "second")
        api.write_log("second", "node", "a line of the second pod")

    threading.Thread(target=replace, daemon=True).start()
    completes(api, job, 2.5)
    follow(job)
    printed = capfd.readouterr().err
    assert "a line of the first pod" in printed
    assert "following the new pod second" in printed
    assert "a line of the second pod" in printed
    assert "earlier job" not in printed


def test_pods_are_matched_by_the_jobs_uid_and_sorted_by_age() -> None:
    job: dict[str, Any] = {
        "kind": "TrainJob",
        "metadata": {"uid": "u2", "creationTimestamp": "2026-11-30T10:00:00Z"},
    }

    def pod(uid: str, at: str, **more: Any) -> dict[str, Any]:
        owner = {"kind": "TrainJob", "uid": uid}
        return {"metadata": {"ownerReferences": [owner], "creationTimestamp": at, **more}}

    theirs = pod("u1", "2026-11-30T10:00:01Z")
    old = pod("u2", "2026-11-30T10:00:02Z")
    new = pod("u2", "2026-11-30T10:00:03Z")
    leaving = pod("u2", "2026-11-30T10:00:04Z", deletionTimestamp="2026-11-30T10:00:05Z")
    assert following.pods_of(job, [new, theirs, leaving, old]) == [leaving, old, new]
