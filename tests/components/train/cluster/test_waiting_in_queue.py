"""A job that waits for Kueue: the recorded conditions of Workloads become reasons and advice."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.kube import connect
from nudge.components.common.clients.kueue import (
    LOCAL_QUEUES,
    PATIENCE_S,
    explain_wait,
    queue_of,
    queue_position,
)
from nudge.components.common.core.errors import UserError
from nudge.components.train.cluster import following, trainjob
from nudge.components.train.settings import LaunchSettings
from tests.components.train.cluster.recorded_jobs import (
    add_workload,
    changes,
    reason_of,
    set_recorded,
)
from tests.components.train.cluster.test_following import NAME, completes, follow, new_job
from tests.kubernetes_api import KubernetesApi

WAITS = LaunchSettings(queue="gpus", deadline_hours=0.01)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.setattr(following, "POLL_S", 0.02)
    monkeypatch.setattr(following, "QUEUE_POLL_S", 0.05)
    monkeypatch.setattr(following, "UNSEEN_S", 0.2)
    monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / "events.jsonl"))
    with KubernetesApi(role="nudge-runner") as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        yield api


def stages(tmp_path: Path) -> list[str]:
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    found = [json.loads(line)["fields"].get("stage", "") for line in lines]
    return [stage for stage in found if stage]


def waits(api: KubernetesApi, settings: LaunchSettings = WAITS) -> dict[str, Any]:
    job = new_job(api, trainjob, settings)
    set_recorded(api, job, changes("trainjobs", "nudge-d2-e788103e")[-1])
    return job


def recorded(name: str, reason: str) -> dict[str, Any]:
    """The first recorded status of a Workload whose QuotaReserved has this reason."""
    return next(each for each in changes("workloads", name) if reason_of(each) == reason)


EXPLAINED = [
    ("trainjob-nudge-d2-e788103e-d27f3", "Misconfigured", "there is no LocalQueue nosuch"),
    (
        "trainjob-nudge-d1-8b53639f-7fc18",
        "Misconfigured",
        "the ClusterQueue takes no jobs of namespace project",
    ),
    (
        "trainjob-nudge-d1-8b53639f-7fc18",
        "ExceedsMaxQuota",
        "cpu never fits in flavor nudge-gpu: 200m requested, at most 0 in all, 200m too much",
    ),
    (
        "trainjob-nudge-dry-ec9d4",
        "ExceedsMaxQuota",
        "cpu never fits in flavor nudge-gpu: 32 requested, at most 4 in all, 28 too much",
    ),
    (
        "rayjob-nudge-e5-43700797-892b2",
        "ExceedsMaxQuota",
        "cpu never fits in flavor nudge-gpu: 250m requested besides 500m, at most 700m in all, "
        "50m too much",
    ),
    (
        "trainjob-nudge-d1-8b53639f-7fc18",
        "WaitingForQuota",
        "preempted: Preempted to accommodate a workload",
    ),
    (
        "trainjob-nudge-d1-8b53639f-7fc18",
        "WaitingForQuota",
        "cpu is in use in flavor nudge-gpu: 100m more needed",
    ),
    (
        "trainjob-nudge-d5-25f68204-01ffa",
        "WaitingForPreemptedWorkloads",
        "100m more needed; waiting for preempted workloads to end",
    ),
]


@pytest.mark.parametrize(("name", "reason", "text"), EXPLAINED)
def test_recorded_reasons_are_explained(name: str, reason: str, text: str) -> None:
    statuses = [each for each in changes("workloads", name) if reason_of(each) == reason]
    assert any(text in explain_wait({"status": each}, "project") for each in statuses)


def test_an_admitted_workload_waits_for_nothing() -> None:
    status = recorded("trainjob-nudge-d1-8b53639f-7fc18", "QuotaReserved")
    workload = {"spec": {"queueName": "gpus"}, "status": status}
    assert explain_wait(workload) == ""
    assert queue_of(workload) == "gpus (ClusterQueue nudge-mn)"


@pytest.mark.parametrize("older", [False, True])
def test_the_reason_is_shown_when_it_changes(
    api: KubernetesApi, tmp_path: Path, older: bool
) -> None:
    """Also on a cluster that serves v1beta1 alone."""
    version = "v1beta1" if older else "v1beta2"
    if older:
        api.forget_version("kueue.x-k8s.io/v1beta2")
    job = waits(api)
    name = "trainjob-nudge-d1-8b53639f-7fc18"
    first, second = recorded(name, "ExceedsMaxQuota"), recorded(name, "WaitingForQuota")
    workload = add_workload(api, job, first, version=version, queue="gpus")

    def change() -> None:
        time.sleep(0.6)
        set_recorded(api, workload, second)

    threading.Thread(target=change, daemon=True).start()
    completes(api, job, 1.5)
    follow(job, settings=WAITS)
    shown = [each for each in stages(tmp_path) if each.startswith("waiting in the queue gpus: ")]
    assert len(shown) == 2
    assert "cpu never fits in flavor nudge-gpu" in shown[0]
    assert "100m more needed" in shown[1]


@pytest.mark.parametrize(("minute_s", "at_least", "at_most"), [(60.0, 1, 1), (0.1, 3, 1000)])
def test_an_unchanged_reason_and_trouble_are_repeated_once_a_minute(
    api: KubernetesApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    minute_s: float,
    at_least: int,
    at_most: int,
) -> None:
    monkeypatch.setattr(following, "REPEAT_S", minute_s)
    job = waits(api)
    status = recorded("trainjob-nudge-dry-ec9d4", "ExceedsMaxQuota")
    add_workload(api, job, status, queue="gpus")
    api.forbid("list", "pods")
    completes(api, job, 1.5)
    follow(job, settings=WAITS)
    shown = [each for each in stages(tmp_path) if "cpu never fits" in each]
    troubles = capfd.readouterr().err.count("cannot read the job's pods")
    assert at_least <= len(shown) <= at_most
    assert at_least <= troubles <= at_most


@pytest.mark.parametrize("served", ["v1beta2", "v1beta1", "none", "forbidden"])
def test_the_position_in_the_queue_is_shown_where_kueue_reports_it(
    api: KubernetesApi, tmp_path: Path, served: str
) -> None:
    for version in {"v1beta1", "v1beta2"} - {served}:
        if served != "forbidden":
            api.forget_version(f"visibility.kueue.x-k8s.io/{version}")
    if served == "forbidden":
        api.forbid("get", "localqueues/pendingworkloads")
    job = waits(api)
    status = recorded("trainjob-nudge-d1-8b53639f-7fc18", "WaitingForQuota")
    workload = add_workload(api, job, status, queue="gpus")
    name = workload["metadata"]["name"]
    api.pending["gpus"] = ["other", name, "third"]

    def change() -> None:
        time.sleep(0.6)
        api.pending["gpus"] = [name, "third"]

    threading.Thread(target=change, daemon=True).start()
    completes(api, job, 1.5)
    follow(job, settings=WAITS)
    shown = [each for each in stages(tmp_path) if each.startswith("waiting in the queue gpus: ")]
    assert "100m more needed" in shown[0]
    positions = [each for each in shown if "position" in each]
    if served in ("none", "forbidden"):
        assert positions == []
    else:
        assert "position 2 of 3; " in positions[0]
        assert "position 1 of 2; " in positions[-1]


def test_a_position_beyond_the_first_page_is_found(api: KubernetesApi) -> None:
    """Kueue lists 1000 pending Workloads by default."""
    job = waits(api)
    workload = add_workload(api, job, {}, queue="gpus")
    name = workload["metadata"]["name"]
    for before, after, text in (
        (1500, 700, "position 1501 of 2000 or more"),
        (2000, 0, "position 2001 of 2001"),
        (999, 0, "position 1000 of 1000 or more"),
        (3, 0, "position 4 of 4"),
    ):
        others = [f"other-{number}" for number in range(before + after)]
        api.pending["gpus"] = [*others[:before], name, *others[before:]]
        assert queue_position(connect(), workload) == text
    api.pending["gpus"] = [f"other-{number}" for number in range(1000)]
    assert queue_position(connect(), workload) == ""


def test_the_queue_that_kueue_assigned_is_shown(api: KubernetesApi, tmp_path: Path) -> None:
    """Kueue labels a job that names no queue with `default`."""
    job = waits(api, LaunchSettings())
    kept = api.objects["TrainJob", api.namespace, NAME]
    kept["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "default"
    completes(api, job, 0.5)
    follow(job)
    assert "waiting in the queue default" in stages(tmp_path)


def test_a_missing_priority_class_is_named(api: KubernetesApi, tmp_path: Path) -> None:
    """Kueue then makes no Workload, as recorded of nudge-j1-08243666."""
    settings = LaunchSettings(queue="gpus", priority_class="urgent", deadline_hours=0.01)
    completes(api, waits(api, settings), 1.5)
    follow(api.find("TrainJob", NAME) or {}, settings=settings)
    assert any("WorkloadPriorityClass 'urgent'" in each for each in stages(tmp_path))


def test_workloads_that_may_not_be_read_do_not_end_the_step(
    api: KubernetesApi, capfd: pytest.CaptureFixture[str]
) -> None:
    api.forbid("list", "workloads")
    job = waits(api)
    completes(api, job, 0.5)
    follow(job, settings=WAITS)
    assert capfd.readouterr().err.count("cannot read why the job waits") == 1


def test_the_deadline_reports_kueues_reason(api: KubernetesApi) -> None:
    settings = LaunchSettings(queue="gpus", deadline_hours=0.0003)
    job = waits(api, settings)
    status = recorded("trainjob-nudge-d2-e788103e-d27f3", "Misconfigured")
    add_workload(api, job, status, queue="gpus")
    with pytest.raises(UserError, match="queue gpus never admitted it: .*LocalQueue nosuch"):
        follow(job, settings=settings)


def test_a_reason_is_reported_within_thirty_seconds() -> None:
    assert following.QUEUE_POLL_S + following.POLL_S + PATIENCE_S * len(LOCAL_QUEUES) <= 30
    assert following.REPEAT_S == 60


def test_the_cluster_prefers_the_newest_version(api: KubernetesApi) -> None:
    assert connect().preferred_version("kueue.x-k8s.io") == "kueue.x-k8s.io/v1beta2"
    assert connect().preferred_version("nobody.example.com") == ""
