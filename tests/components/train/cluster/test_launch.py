"""TrainJobs and RayJobs on the stand-in API server, with a controller that really trains."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.kube import connect
from nudge.components.common.core.errors import UserError
from nudge.components.train.cluster import launch as launching
from nudge.components.train.cluster import rayjob, trainjob
from nudge.components.train.cluster.handover import Handover
from nudge.components.train.cluster.job_status import PORT_VARIABLE
from nudge.components.train.cluster.jobs import TRUST_VARIABLES, TRUSTED, Engine, Step, job_name
from nudge.components.train.cluster.launch import launch
from nudge.components.train.settings import LaunchSettings, TrainSettings
from tests.components.train.cluster.conftest import on_cluster
from tests.components.train.cluster.test_rayjob import containers
from tests.components.train.conftest import lines, outputs, run, weights
from tests.kubernetes_api import KubernetesApi
from tests.kubernetes_schemas import definition, problems, schema

NAME = job_name("run-1")


def reaches(api: KubernetesApi, job: dict[str, Any], stage: str, message: str = "") -> None:
    """Set the job's status as Kubeflow Trainer or KubeRay does at this stage."""
    if job["kind"] == "TrainJob":
        type = {"suspended": "Suspended", "complete": "Complete", "failed": "Failed"}.get(stage)
        conditions = [state(type, "JobsEnded", message)] if type else []
        api.set_status(job, conditions=conditions)
        return
    deployment, of_the_job = {
        "suspended": ("Suspended", ""),
        "running": ("Running", "RUNNING"),
        "complete": ("Complete", "SUCCEEDED"),
        # Older releases of KubeRay have no Failed: a job that ended is Complete.
        "failed": ("Complete", "FAILED"),
    }[stage]
    why = {"reason": "JobsEnded", "message": message} if stage in ("failed", "suspended") else {}
    api.set_status(job, jobDeploymentStatus=deployment, jobStatus=of_the_job, **why)


def state(type: str, reason: str = "", message: str = "") -> dict[str, Any]:
    at = {"lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"type": type, "status": "True", "reason": reason or type, "message": message, **at}


def pod_of(api: KubernetesApi, job: dict[str, Any]) -> tuple[str, str]:
    """A pod of the job and the container in it whose log is followed."""
    name = job["metadata"]["name"]
    engine = launching.ENGINES[job["kind"].lower()]
    labels, container = engine.LOG
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"]}
    owner |= {"name": name, "uid": job["metadata"]["uid"]}
    pod = f"{name}-0"
    meta = {"name": pod, "labels": {**engine.pods(name), **labels}, "ownerReferences": [owner]}
    spec = {"containers": [{"name": container, "image": "i"}]}
    api.add({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    return pod, container


def really_trains(api: KubernetesApi) -> Callable[[dict[str, Any]], None]:
    """A controller that queues, starts and ends a job, running what its pod would run."""

    def control(job: dict[str, Any]) -> None:
        api.set_status(job, conditions=[state("Suspended", "Queued")])
        time.sleep(0.3)
        api.set_status(job, conditions=[])
        (pod, container), trainer = pod_of(api, job), job["spec"]["trainer"]
        command = [sys.executable, *trainer["command"][1:], *trainer["args"]]
        # Kubeflow Trainer sets these for torchrun.
        placed = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "1"}
        done = subprocess.run(
            command, env={**os.environ, **placed}, capture_output=True, text=True, timeout=200
        )
        api.write_log(pod, container, *done.stderr.splitlines())
        api.write_log(pod, container, "train: 12/12 steps loss 5.1")
        time.sleep(0.3)
        end = "Complete" if done.returncode == 0 else "Failed"
        api.set_status(job, conditions=[state(end, "JobsEnded", f"status {done.returncode}")])

    return control


def test_a_trained_model_comes_back(
    api: KubernetesApi,
    small: Callable[..., TrainSettings],
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / "events.jsonl"))
    api.on_change("TrainJob", really_trains(api))
    settings = on_cluster(launching.ENGINES["trainjob"], small, tmp_path)
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
    assert not (tmp_path / "shared" / NAME).exists()


@pytest.mark.parametrize("older", [False, True])
def test_the_object_fits_the_schema_of_newer_and_older_releases(older: bool) -> None:
    settings = LaunchSettings(queue="gpus", priority_class="low", volume_claim="shared")
    found = definition({"apiVersion": trainjob.KIND.api_version, "kind": "TrainJob"})
    assert found
    known = schema(found)
    if older:
        spec = dict(known["properties"]["spec"])
        left = {"runtimePatches", "activeDeadlineSeconds"}
        spec["properties"] = {k: v for k, v in spec["properties"].items() if k not in left}
        known = {"properties": {"spec": spec}}
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}
    step = Step("i", owner, trusted={"configMap": {"name": "bundle"}})
    body = trainjob.body(settings, name="n", handover="s3://b/k", schema=known, step=step)
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert body["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert body["metadata"]["ownerReferences"] == [owner]
    port = body["metadata"]["annotations"]["trainer.opendatahub.io/metrics-port"]
    assert {"name": PORT_VARIABLE, "value": port} in body["spec"]["trainer"]["env"]
    overrides = body["spec"].pop("podTemplateOverrides", None)
    assert bool(overrides) is older
    assert ("runtimePatches" in body["spec"]) is not older
    assert problems(body) == []


def test_names_are_of_the_run_alone() -> None:
    assert job_name("Run_1/x" * 30) == job_name("Run_1/x" * 30)
    assert job_name("run-1") != job_name("run_1")
    assert len(job_name("x" * 300)) <= 50


def handover_of(job: dict[str, Any]) -> Handover:
    """The folder named in the job's command."""
    if job["kind"] == "TrainJob":
        return Handover(job["spec"]["trainer"]["args"][0])
    return Handover(job["spec"]["entrypoint"].split()[-1])


def sends_a_model(api: KubernetesApi, folder: Path) -> Callable[[dict[str, Any]], None]:
    """A controller whose job is complete at once, with a model of one file."""

    def control(job: dict[str, Any]) -> None:
        for name in ("model", "history", "report"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text("{}")
            handover_of(job).send(name, folder / name)
        reaches(api, job, "complete")

    return control


def fails(api: KubernetesApi, code: int = 1) -> Callable[[dict[str, Any]], None]:
    def control(job: dict[str, Any]) -> None:
        pod, container = pod_of(api, job)
        api.write_log(pod, container, "CUDA out of memory")
        end = {"terminated": {"exitCode": code, "reason": "Error"}}
        common = {"image": "i", "imageID": "", "ready": False, "restartCount": 0}
        found = api.find("Pod", pod)
        assert found
        api.set_status(found, containerStatuses=[{"name": container, "state": end, **common}])
        reaches(api, job, "failed")

    return control


def creations(api: KubernetesApi, engine: Engine) -> int:
    asked = [verb for verb, plural, _ in api.requests if plural == engine.KIND.plural]
    return asked.count("create")


def test_a_failure_reports_its_cause_and_a_retry_trains(
    api: KubernetesApi, engine: Engine, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    api.on_change(engine.KIND.name, fails(api))
    paths = {"tokens": tokens, **outputs(tmp_path)}
    with pytest.raises(UserError, match="JobsEnded[^$]*status 1[^$]*CUDA out of memory"):
        launch(settings, paths)
    assert not (tmp_path / "model").exists()
    api.on_change(engine.KIND.name, sends_a_model(api, tmp_path / "made"))
    launch(settings, paths)
    assert (tmp_path / "model" / "config.json").is_file()
    assert [verb for verb, kind, _ in api.requests if kind == engine.KIND.plural].count(
        "create"
    ) == 2


def test_a_retry_adopts_the_job_that_runs(
    api: KubernetesApi, engine: Engine, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    """The step died while its job ran, or the answer to its creation was lost."""
    api.lose_next(verb="create")
    api.on_change(engine.KIND.name, sends_a_model(api, tmp_path / "made"))
    launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert [verb for verb, kind, _ in api.requests if kind == engine.KIND.plural].count(
        "create"
    ) == 2
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_job_of_somebody_else_under_this_name(
    api: KubernetesApi, engine: Engine, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    spec: dict[str, Any] = {"entrypoint": "x"}
    if engine.KIND.name == "TrainJob":
        spec = {"runtimeRef": {"name": "r"}, "trainer": {"args": ["x"]}}
    kind = {"apiVersion": engine.KIND.api_version, "kind": engine.KIND.name}
    theirs = api.add({**kind, "metadata": {"name": NAME}, "spec": spec})
    with pytest.raises(UserError, match="belongs to another run"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert api.find(engine.KIND.name, NAME) == theirs


def test_a_job_deleted_by_hand(
    api: KubernetesApi, engine: Engine, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    def delete(job: dict[str, Any]) -> None:
        time.sleep(0.2)
        api.remove(engine.KIND.name, job["metadata"]["name"])

    api.on_change(engine.KIND.name, delete)
    with pytest.raises(UserError, match=f"{engine.KIND.name} {NAME} was deleted before"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})


def test_a_quota_that_never_admits(
    api: KubernetesApi,
    engine: Engine,
    small: Callable[..., TrainSettings],
    tokens: Path,
    tmp_path: Path,
) -> None:
    def queue(job: dict[str, Any]) -> None:
        reaches(api, job, "suspended", "needs 9 GPUs")

    api.on_change(engine.KIND.name, queue)
    settings = on_cluster(engine, small, tmp_path, queue="gpus", deadline_hours=0.0006)
    with pytest.raises(UserError, match="queue gpus never admitted it: .*needs 9 GPUs"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert api.find(engine.KIND.name, NAME) is None


def test_a_retry_does_not_restart_the_deadline(
    api: KubernetesApi, engine: Engine, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    found = definition({"apiVersion": engine.KIND.api_version, "kind": engine.KIND.name})
    assert found
    body = engine.body(
        settings.cluster, name=NAME, handover=f"{tmp_path}/shared/{NAME}",
        schema=schema(found), step=Step("i"),
    )  # fmt: skip
    reaches(api, api.add(body), "running")
    kept = api.objects[engine.KIND.name, api.namespace, NAME]
    kept["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    with pytest.raises(UserError, match="is not done 72 h after its creation"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert api.find(engine.KIND.name, NAME) is None


def test_cancelling_the_step_deletes_its_job(
    api: KubernetesApi, engine: Engine, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    begun = threading.Event()
    api.on_change(engine.KIND.name, lambda job: begun.set())

    def cancel() -> None:
        begun.wait(60)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert ended.value.code == 143
    assert api.find(engine.KIND.name, NAME) is None


def test_a_missing_right_and_a_missing_kind(
    api: KubernetesApi, engine: Engine, settings: TrainSettings, tokens: Path, tmp_path: Path
) -> None:
    api.forbid("create", engine.KIND.plural)
    with pytest.raises(
        UserError, match=rf'"resources": \["{engine.KIND.plural}"\], "verbs": \["create"\]'
    ):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    api.forget_kind(engine.KIND.name)
    with pytest.raises(
        UserError, match=f"no {engine.KIND.name}; it comes with {engine.KIND.needs[:5]}"
    ):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})


def within_a_step(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    """Let this process be the step of a pipeline whose pod has this ``spec``."""
    pod = api.add({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "step"}, "spec": spec})
    monkeypatch.setenv("KFP_POD_NAME", "step")
    monkeypatch.setenv("KFP_POD_UID", pod["metadata"]["uid"])


def test_the_job_belongs_to_the_steps_pod_and_inherits_its_environment(
    api: KubernetesApi,
    engine: Engine,
    settings: TrainSettings,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = {"configMap": {"name": "b", "items": [{"key": "dsp-ca.crt", "path": "ca.crt"}]}}
    spec = {
        "containers": [{"name": "main", "image": "registry/step@sha256:1"}],
        "volumes": [{"name": "custom-ca", **bundle}, {"name": "scratch", "emptyDir": {}}],
    }
    within_a_step(api, monkeypatch, spec)
    own = {"HF_ENDPOINT": "https://hub.example.com", "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "p:1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CA_BUNDLE", "/tmp/ca-bundle-of-the-step.crt")
    made: list[dict[str, Any]] = []

    def remove(job: dict[str, Any]) -> None:
        made.append(job)
        api.remove("Pod", "step")

    api.on_change(engine.KIND.name, remove)
    with pytest.raises(UserError, match="was deleted before it was complete"):
        launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert connect().get(engine.KIND, NAME) is None
    spec = made[0]["spec"]
    assert "registry/step@sha256:1" in str(spec)
    assert problems(made[0]) == []
    ranks = [spec["trainer"]] if "trainer" in spec else containers(spec)
    ranks = [each for each in ranks if each.get("name") != rayjob.SUBMITTER]
    trust = dict.fromkeys(TRUST_VARIABLES, f"{TRUSTED}/ca.crt")
    for each in ranks:
        variables = {one["name"]: one.get("value") for one in each["env"]}
        assert variables.items() >= {**own, **trust}.items()
    for each in containers(spec):
        assert {"name": "trusted", "mountPath": TRUSTED} in each["volumeMounts"]
    assert str({"name": "trusted", **bundle}) in str(spec)
    assert "scratch" not in str(spec)


def test_a_step_without_a_bundle_gives_the_job_none(
    api: KubernetesApi,
    engine: Engine,
    settings: TrainSettings,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    within_a_step(api, monkeypatch, {"containers": [{"name": "main", "image": "i"}]})
    made: list[dict[str, Any]] = []

    def take(job: dict[str, Any]) -> None:
        made.append(job)
        sends_a_model(api, tmp_path / "made")(job)

    api.on_change(engine.KIND.name, take)
    launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert not any(name in str(made[0]) for name in (*TRUST_VARIABLES, TRUSTED))


def test_the_nodes_get_the_model_that_the_registry_names(
    api: KubernetesApi,
    small: Callable[..., TrainSettings],
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their account has no access to the registry."""
    settings = small(
        base_model="incumbent://m?else=s3://b/m", launcher="trainjob",
        cluster=LaunchSettings(exchange=str(tmp_path / "shared"), nodes=1, gpus_per_node=0),
    )  # fmt: skip
    monkeypatch.setattr(launching, "resolved", {settings.base_model: "s3://b/m/v2"}.__getitem__)
    recipes: list[str] = []

    def control(job: dict[str, Any]) -> None:
        handover_of(job).fetch("recipe", tmp_path / "recipe")
        recipes.append((tmp_path / "recipe").read_text())
        sends_a_model(api, tmp_path / "made")(job)

    api.on_change("TrainJob", control)
    launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert json.loads(recipes[0])["train"]["base_model"] == "s3://b/m/v2"


def test_a_rayjob_is_followed_from_the_queue_to_its_model(
    api: KubernetesApi,
    small: Callable[..., TrainSettings],
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / "events.jsonl"))
    settings = on_cluster(launching.ENGINES["rayjob"], small, tmp_path, queue="gpus")

    def control(job: dict[str, Any]) -> None:
        assert problems(job) == []
        assert handover_of(job).read("tokens")
        reaches(api, job, "suspended", "waits")
        time.sleep(0.3)
        reaches(api, job, "running")
        pod, container = pod_of(api, job)
        api.write_log(pod, container, "(RayTrainWorker pid=7) train: 5/12 steps loss 5.1")
        time.sleep(0.5)
        sends_a_model(api, tmp_path / "made")(job)

    api.on_change("RayJob", control)
    launch(settings, {"tokens": tokens, **outputs(tmp_path)})
    assert (tmp_path / "model" / "config.json").is_file()
    assert api.find("RayJob", NAME) is None
    assert api.all("Pod") == []
    assert not (tmp_path / "shared" / NAME).exists()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert "waiting in the queue gpus" in [event["fields"].get("stage") for event in events]
    assert any((event["done"], event["total"]) == (5, 12) for event in events if "done" in event)
