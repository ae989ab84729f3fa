"""Curves, gate and report in one MLflow run, from whichever process has them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.evaluation import (
    Evaluation,
    Metrics,
    Verdict,
    write_evaluation,
)
from nudge.components.common.artifacts.model import Training
from nudge.components.common.clients import tracking
from nudge.components.evaluate.account import track_evaluation
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import lines, outputs

Small = Callable[..., TrainSettings]

FOUND = Evaluation(
    recipe="mine",
    verdict=Verdict(promote=True, reason="0.1 better", difference_bits_per_byte=-0.1),
    metrics={"candidate": Metrics(bits_per_byte=1.2), "base": Metrics(bits_per_byte=1.3)},
    training=Training(steps=12),
)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "tracked").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return mlflow.MlflowClient()


def test_gate_and_report_join_the_curves_of_the_training(
    small: Small, tokens: Path, tmp_path: Path, client: Any
) -> None:
    train(small(max_steps=3), tokens=tokens, **outputs(tmp_path))
    write_evaluation(tmp_path / "evaluation", FOUND)
    page = tmp_path / "page"
    page.write_text("<p>better</p>")
    track_evaluation(tmp_path / "evaluation", page, tmp_path / "history")
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["evaluate/candidate/bits_per_byte"] == 1.2
    assert run.data.metrics["evaluate/promote"] == 1.0
    assert run.data.tags["nudge.verdict"] == "0.1 better"
    names = {each.path for each in client.list_artifacts(run.info.run_id, "nudge")}
    assert names == {
        f"nudge/{name}" for name in ("train.html", "evaluation.html", "evaluation.json")
    }
    tracked = client.get_metric_history(run.info.run_id, "loss")
    assert [m.value for m in sorted(tracked, key=lambda m: m.step)] == lines(tmp_path)


def test_the_run_of_the_platform_is_used(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = client.create_run("0", run_name="from the platform").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", platform)
    write_evaluation(tmp_path / "evaluation", FOUND)
    (tmp_path / "page").write_text("")
    track_evaluation(tmp_path / "evaluation", tmp_path / "page", tmp_path / "no history")
    (run,) = client.search_runs(["0"])
    assert run.info.run_id == platform
    assert run.data.metrics["evaluate/difference_bits_per_byte"] == -0.1


def test_a_job_elsewhere_that_could_not_track_is_logged_when_it_ends(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a password, a job's pods get no variables: its YAML is no place for one."""
    monkeypatch.setenv("NUDGE_RUN_ID", "run-7")
    assert tracking.for_nodes() == {"MLFLOW_TRACKING_URI": (tmp_path / "tracked").as_uri()}
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary7Qe1")
    assert tracking.for_nodes() == {}
    history = tmp_path / "history"
    history.mkdir()
    points = [{"step": step, "loss": 3 - step / 500, "mfu": None} for step in range(1, 1001)]
    (history / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in points))
    (tmp_path / "report").write_text("<p>curve</p>")
    for _ in range(2):  # a retry of the step finds that it is done
        tracking.track_history(history, "model", {"epochs": 1.0}, tmp_path / "report")
    (run,) = client.search_runs(["0"])
    assert run.data.tags["nudge.run_id"] == "run-7"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 1000
    assert tracking.tracked_run(history) == run.info.run_id
    other = tracking.Tracking()
    other.start("model")  # another pod of the same pipeline run, without the history
    assert other.run_id == run.info.run_id


def test_a_fault_in_the_middle_is_a_warning(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError("the volume is gone")

    monkeypatch.setattr(type(client), "log_text", gone)
    write_evaluation(tmp_path / "evaluation", replace(FOUND, training=None))
    (tmp_path / "page").write_text("")
    track_evaluation(tmp_path / "evaluation", tmp_path / "page", tmp_path / "none")
    assert capfd.readouterr().err.count("is not tracked: OSError: the volume is gone") == 1
