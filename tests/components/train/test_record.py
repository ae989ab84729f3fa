"""MLflow, where its tracking variable is set: the run as it was kept, or a clear refusal."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nudge.components.common.errors import UserError
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train

from tests.components.train.conftest import lines, outputs

Small = Callable[..., TrainSettings]


def test_mlflow_that_is_not_installed_is_told_before_training(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"pip install 'nudge-lm\[mlflow\]', or unset it"):
        train(small(), tokens=tokens, **outputs(tmp_path))
    assert not (tmp_path / "model").exists()


@pytest.mark.long
def test_mlflow_has_the_run_with_every_figure(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "tracked").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train(small(), tokens=tokens, **outputs(tmp_path))
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.003"
    for kind in ("loss", "validation_loss"):
        kept = client.get_metric_history(run.info.run_id, kind)
        kept.sort(key=lambda metric: metric.step)
        assert [metric.value for metric in kept] == lines(tmp_path, kind)
    with pytest.raises(UserError, match="before step 2"):
        train(small(learning_rate=1e30, warmup_share=0.0), tokens=tokens, **outputs(tmp_path / "b"))
    statuses = sorted(run.info.status for run in client.search_runs(["0"]))
    assert statuses == ["FAILED", "FINISHED"]


@pytest.mark.long
def test_an_mlflow_that_does_not_answer_ends_before_training(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI: MLflow does not take the run"):
        train(small(), tokens=tokens, **outputs(tmp_path))
    assert not (tmp_path / "model").exists()
