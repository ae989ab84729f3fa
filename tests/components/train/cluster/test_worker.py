"""The command of a job's pod: its exit status and its sentence after a rank failed."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.spending.budget import OverBudget
from nudge.components.common.spending.prices import Budget, Prices
from nudge.components.common.spending.usage import Usage
from nudge.components.train.cluster import ray_driver, worker
from nudge.components.train.cluster.handover import Handover
from nudge.components.train.cluster.launch import _send
from nudge.components.train.cluster.ray_driver import _cause
from nudge.components.train.limits import Limits
from nudge.components.train.settings import TrainSettings
from nudge.components.train.torchrun import report_error, reported_error

ROOT = Path(__file__).parents[4]
RUNTIME = ROOT / "manifests" / "overlays" / "multi-node" / "training-runtime.yaml"


def rank_that(action: str) -> Any:
    """Instead of torchrun: a process that ends as torchrun and its rank would."""
    code = (
        f"import os, pathlib, sys; error = pathlib.Path(os.environ['NUDGE_ERROR_FILE']); {action}"
    )
    return lambda folder: [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("action", "status", "sentence"),
    [
        ("error.write_text('no such model\\n' * 2); sys.exit(1)", 2, "error: no such model"),
        (
            "error.write_text('no answer'); error.with_suffix('.transient').touch(); sys.exit(1)",
            75,
            "error: no answer",
        ),
        (
            "error.write_text('over budget: 3 h'); error.with_suffix('.over-budget').touch(); "
            "sys.exit(1)",
            3,
            "error: over budget: 3 h",
        ),
        ("sys.exit(1)", 1, ""),
        ("os.kill(os.getpid(), 9)", 137, ""),
    ],
)
def test_the_exit_status_says_whether_a_restart_may_help(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    action: str,
    status: int,
    sentence: str,
) -> None:
    monkeypatch.setattr(worker, "command", rank_that(action))
    monkeypatch.setattr(Handover, "fetch", lambda self, name, target: None)
    with pytest.raises(SystemExit) as ended:
        worker.main.main([str(tmp_path)], standalone_mode=False)
    assert ended.value.code == status
    assert capfd.readouterr().err.strip() == sentence


def test_a_rank_that_the_kernel_killed_for_memory_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events = tmp_path / "memory.events"
    events.write_text("oom 0\noom_kill 0\n")
    monkeypatch.setattr(worker, "MEMORY_EVENTS", events)
    action = f"pathlib.Path({str(events)!r}).write_text('oom_kill 1\\n'); sys.exit(1)"
    monkeypatch.setattr(worker, "command", rank_that(action))
    with pytest.raises(UserError, match=r"raise\s+train\.cluster\.memory"):
        worker.run_ranks_here(tmp_path)


def test_a_rank_gets_only_the_variables_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A job's pod may have more: variables of a Secret, and the token of its own account."""
    needed = {
        "PET_NNODES": "2",
        "AWS_ACCESS_KEY_ID": "id",
        "NCCL_DEBUG": "INFO",
        "FI_PROVIDER": "x",
    }
    others = {"DATABASE_PASSWORD": "canary", "KF_PIPELINES_SA_TOKEN_PATH": "canary"}
    for name, value in {**needed, **others, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    seen = tmp_path / "seen"
    action = f"pathlib.Path({str(seen)!r}).write_text(repr(dict(os.environ)))"
    monkeypatch.setattr(worker, "command", rank_that(action))
    worker.run_ranks_here(tmp_path)
    got = ast.literal_eval(seen.read_text())
    assert needed.items() <= got.items()
    assert {"PYTHONSAFEPATH", "NUDGE_ERROR_FILE", "KUBERNETES_SERVICE_HOST", "PATH"} <= got.keys()
    assert not others.keys() & got.keys()


@pytest.mark.parametrize("kind", [UserError, Transient, OverBudget])
def test_a_rank_reports_the_kind_of_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[UserError]
) -> None:
    monkeypatch.setenv("NUDGE_ERROR_FILE", str(tmp_path / "error"))
    assert reported_error(tmp_path / "error") is None
    for _ in range(2):  # two ranks of the node
        report_error(kind("over budget: why"))
    reported = reported_error(tmp_path / "error")
    assert (type(reported), str(reported)) == (kind, "over budget: why")


@pytest.mark.parametrize("kind", [UserError, Transient, OverBudget])
def test_the_ray_driver_passes_on_the_kind_of_error(kind: type[UserError]) -> None:
    class Failed(Exception):
        def __init__(self, failures: dict[int, Exception]) -> None:
            super().__init__("a worker failed")
            self.worker_failures = failures

    assert type(cause := _cause(Failed({0: kind("over budget: why")}))) is kind
    assert str(cause) == "over budget: why"
    assert type(_cause(Failed({0: OSError("killed")}))) is Transient


def test_the_runtime_fails_at_once_after_bad_input_and_restarts_otherwise() -> None:
    documents = yaml.safe_load_all(RUNTIME.read_text(encoding="utf-8"))
    (runtime,) = [each for each in documents if each["kind"] == "TrainingRuntime"]
    jobset = runtime["spec"]["template"]["spec"]
    (replicated,) = jobset["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    moved, permanent = job["podFailurePolicy"]["rules"]
    assert moved["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert permanent["action"] == "FailJob"
    codes = permanent["onExitCodes"]
    assert codes["values"] == [*worker.PERMANENT, 137]
    assert worker.TRY_AGAIN not in codes["values"]
    assert codes["containerName"] == pod["containers"][0]["name"]
    (rule,) = jobset["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert jobset["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.long
def test_a_missing_base_model_ends_the_worker_with_its_sentence(tmp_path: Path) -> None:
    handover = Handover(str(tmp_path / "shared"))
    (tmp_path / "recipe").write_text("train: {base_model: /no/such/model}")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "one").write_text("x")
    for name in ("recipe", "tokens"):
        handover.send(name, tmp_path / name)
    module = "nudge.components.train.cluster.worker"
    done = subprocess.run(
        [sys.executable, "-m", module, handover.uri], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == UserError.status, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_a_rank_on_ray_has_the_limits_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The recipe is one that `launch` sends. Ray itself is replaced: only the device is asked."""
    limits = Limits(Budget(core_hours=3.0), Prices(core_hour=2.0), Usage(core_seconds=60.0))
    handover = Handover(str(tmp_path / "handover"))
    (tmp_path / "tokens").write_text("tokens")
    settings = TrainSettings(mode="scratch", model_size="10M")
    _send(handover, settings, tmp_path / "tokens", limits)
    ray = SimpleNamespace(get_device=lambda: torch.device("cpu"))
    ray.train = SimpleNamespace(torch=ray)
    for name in ("ray", "ray.train", "ray.train.torch"):
        monkeypatch.setitem(sys.modules, name, ray)
    got: list[Limits] = []
    monkeypatch.setattr(
        "nudge.components.train.train.train_rank", lambda *given: got.append(given[-1])
    )
    monkeypatch.setattr(ray_driver, "_tokens", lambda *_: tmp_path)
    ray_driver.run_rank({"handover": handover.uri})
    assert got == [limits]
