"""A TrainJob against the stand-in API server; its controller runs the real training command."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nudge.components.common.errors import UserError
from nudge.components.common.kube import connect
from nudge.components.train import launch as launching
from nudge.components.train.exchange import Exchange
from nudge.components.train.launch import launch
from nudge.components.train.settings import LaunchSettings, TrainSettings
from nudge.components.train.trainjob import TRAIN_JOB, job_name, train_job

from tests.components.train.conftest import lines, outputs, run, weights
from tests.kubernetes_api import KubernetesApi
from tests.kubernetes_schemas import definition, problems, schema

NAME = job_name("run-1")
SCHEMA_OF = {"apiVersion": TRAIN_JOB.api_version, "kind": "TrainJob"}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.setattr(launching, "POLL_S", 0.05)
    monkeypatch.setenv("NUDGE_RUN_ID", "run-1")
    with KubernetesApi(role="nudge-runner") as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        yield api


@pytest.fixture
def settings(small: Callable[..., TrainSettings], tmp_path: Path) -> TrainSettings:
    return on_cluster(small, tmp_path)


def on_cluster(small: Callable[..., TrainSettings], tmp_path: Path, **more: Any) -> TrainSettings:
    given = {"exchange": str(tmp_path / "shared"), "nodes": 1, "gpus_per_node": 0, **more}
    return small(launcher="trainjob", cluster=LaunchSettings(**given))


def state(type: str, reason: str = "", message: str = "") -> dict[str, Any]:
    at = {"lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"type": type, "status": "True", "reason": reason or type, "message": message, **at}


def pod_of(api: KubernetesApi, job: dict[str, Any]) -> str:
    name = f"{job['metadata']['name']}-node-0-0"
    labels = {launching.POD_LABEL: job["metadata"]["name"], **launching.FIRST_NODE}
    owner = {"apiVersion": TRAIN_JOB.api_version, "kind": "TrainJob"}
    owner |= {"name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
    meta = {"name": name, "labels": labels, "ownerReferences": [owner]}
    spec = {"containers": [{"name": "node", "image": "i"}]}
    api.add({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    return name


def really_trains(api: KubernetesApi) -> Callable[[dict[str, Any]], None]:
    """A controller that queues, starts and ends a job, running what its pod would run."""

    def control(job: dict[str, Any]) -> None:
        api.set_status(job, conditions=[state("Suspended", "Queued")])
        time.sleep(0.3)
        api.set_status(job, conditions=[])
        pod, trainer = pod_of(api, job), job["spec"]["trainer"]
        command = [sys.executable, *trainer["command"][1:], *trainer["args"]]
        # As the runtime of Kubeflow Trainer does for torchrun.
        placed = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "1"}
        done = subprocess.run(
            command, env={**os.environ, **placed}, capture_output=True, text=True, timeout=200
        )
        api.write_log(pod, "node", *done.stderr.splitlines())
        api.write_log(pod, "node", "train: 12/12 steps loss 5.1")
        time.sleep(0.3)
        end = "Complete" if done.returncode == 0 else "Failed"
        api.set_status(job, conditions=[state(end, "JobsEnded", f"status {done.returncode}")])

    return control


def test_a_trained_model_comes_back(
    api: KubernetesApi,
    settings: TrainSettings,
    small: Callable[..., TrainSettings],
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / "events.jsonl"))
    api.on_change("TrainJob", really_trains(api))
    launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    run(small(), tokens, tmp_path / "alone")
    assert weights(tmp_path) == weights(tmp_path / "alone")
    assert lines(tmp_path) == lines(tmp_path / "alone")
    assert api.find("TrainJob", NAME) is None
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    stages = [event["fields"].get("stage") for event in events]
    assert "suspended" in stages
    assert events[-1]["event"] == "end"
    assert (events[-1]["done"], events[-1]["total"]) == (12, 12)


@pytest.mark.parametrize("older", [False, True])
def test_the_object_fits_the_schema_of_newer_and_older_releases(older: bool) -> None:
    given = LaunchSettings(queue="gpus", priority_class="low", volume_claim="shared")
    found = definition(SCHEMA_OF)
    assert found
    known = schema(found)
    if older:
        spec = dict(known["properties"]["spec"])
        left = {"runtimePatches", "activeDeadlineSeconds"}
        spec["properties"] = {k: v for k, v in spec["properties"].items() if k not in left}
        known = {"properties": {"spec": spec}}
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}
    body = train_job(given, name="n", exchange="s3://b/k", image="i", schema=known, owner=owner)
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert body["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert body["metadata"]["ownerReferences"] == [owner]
    overrides = body["spec"].pop("podTemplateOverrides", None)
    assert bool(overrides) is older
    assert ("runtimePatches" in body["spec"]) is not older
    assert problems(body) == []


def test_names_are_of_the_run_alone() -> None:
    assert job_name("Run_1/x" * 30) == job_name("Run_1/x" * 30)
    assert job_name("run-1") != job_name("run_1")
    assert len(job_name("x" * 300)) <= 50


def hands_over(api: KubernetesApi, place: Path) -> Callable[[dict[str, Any]], None]:
    """A controller whose job is complete at once, with a model of one file."""

    def control(job: dict[str, Any]) -> None:
        for name in ("model", "history", "report"):
            (place / name).mkdir(parents=True, exist_ok=True)
            (place / name / "config.json").write_text("{}")
            Exchange(job["spec"]["trainer"]["args"][0]).send(name, place / name)
        api.set_status(job, conditions=[state("Complete", "JobsEnded")])

    return control


def fails(api: KubernetesApi) -> Callable[[dict[str, Any]], None]:
    def control(job: dict[str, Any]) -> None:
        pod = pod_of(api, job)
        api.write_log(pod, "node", "CUDA out of memory")
        end = {"terminated": {"exitCode": 1, "reason": "Error"}}
        common = {"image": "i", "imageID": "", "ready": False, "restartCount": 0}
        found = api.find("Pod", pod)
        assert found
        api.set_status(found, containerStatuses=[{"name": "node", "state": end, **common}])
        api.set_status(job, conditions=[state("Failed", "JobsFailed")])

    return control


def test_a_failure_tells_its_cause_and_a_retry_trains_again(
    api: KubernetesApi, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    api.on_change("TrainJob", fails(api))
    paths = {"tokens": tokens, **outputs(tmp_path)}
    with pytest.raises(UserError, match="JobsFailed[^$]*status 1[^$]*CUDA out of memory"):
        launch(settings, paths)
    assert not (tmp_path / "model").exists()
    api.on_change("TrainJob", hands_over(api, tmp_path / "made"))
    launch(settings, paths)
    assert (tmp_path / "model" / "config.json").is_file()
    assert [verb for verb, kind, _ in api.requests if kind == "trainjobs"].count("create") == 2


def test_a_retry_adopts_the_job_that_runs(
    api: KubernetesApi, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    """The step died while its job went on; also an answer that was lost made a job."""
    api.lose_next(verb="create")
    api.on_change("TrainJob", hands_over(api, tmp_path / "made"))
    launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert [verb for verb, kind, _ in api.requests if kind == "trainjobs"].count("create") == 2
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_job_of_somebody_else_under_this_name(
    api: KubernetesApi, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    spec = {"runtimeRef": {"name": "r"}, "trainer": {"args": ["x"]}}
    theirs = api.add({**SCHEMA_OF, "metadata": {"name": NAME}, "spec": spec})
    with pytest.raises(UserError, match="is not of this run"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert api.find("TrainJob", NAME) == theirs


def test_a_job_deleted_by_hand(
    api: KubernetesApi, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    def delete(job: dict[str, Any]) -> None:
        time.sleep(0.2)
        api.remove("TrainJob", job["metadata"]["name"])

    api.on_change("TrainJob", delete)
    with pytest.raises(UserError, match=f"the TrainJob {NAME} was deleted before"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})


def test_quota_that_is_never_given(
    api: KubernetesApi, small: Callable[..., TrainSettings], tokens: Path, tmp_path: Path
) -> None:
    def queue(job: dict[str, Any]) -> None:
        api.set_status(job, conditions=[state("Suspended", "QuotaReserved", "needs 9 GPUs")])

    api.on_change("TrainJob", queue)
    settings = on_cluster(small, tmp_path, queue="gpus", deadline_hours=0.0003)
    with pytest.raises(UserError, match="queue gpus never admitted it: .*needs 9 GPUs"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert api.find("TrainJob", NAME) is None


def test_cancelling_the_step_deletes_its_job(
    api: KubernetesApi, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    begun = threading.Event()
    api.on_change("TrainJob", lambda job: begun.set())

    def cancel() -> None:
        begun.wait(60)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert ended.value.code == 143
    assert api.find("TrainJob", NAME) is None


def test_a_missing_right_and_a_missing_kind(
    api: KubernetesApi, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    api.forbid("create", "trainjobs")
    with pytest.raises(UserError, match=r'"resources": \["trainjobs"\], "verbs": \["create"\]'):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    api.forget_kind("TrainJob")
    with pytest.raises(UserError, match="no TrainJob; it comes with Kubeflow Trainer"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})


def test_the_job_belongs_to_the_steps_pod(
    api: KubernetesApi,
    settings: TrainSettings,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meta = {"name": "step"}
    spec = {"containers": [{"name": "main", "image": "i"}]}
    step = api.add({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    monkeypatch.setenv("KFP_POD_NAME", "step")
    monkeypatch.setenv("KFP_POD_UID", step["metadata"]["uid"])
    api.on_change("TrainJob", lambda job: api.remove("Pod", "step"))
    with pytest.raises(UserError, match="was deleted before it was complete"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert connect().get(TRAIN_JOB, NAME) is None


def test_what_is_damaged_on_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("abc")
    exchange = Exchange(str(tmp_path / "shared"))
    with pytest.raises(UserError, match="holds no complete model"):
        exchange.fetch("model", tmp_path / "out")
    exchange.send("model", tmp_path / "in")
    (tmp_path / "shared" / "model" / "a").write_text("abd")
    with pytest.raises(UserError, match="is damaged"):
        exchange.fetch("model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
