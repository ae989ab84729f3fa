"""With MLflow's tracking variable set: the run is tracked, or a warning says why not."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import lines, outputs

Small = Callable[..., TrainSettings]


WARNING = "MLFLOW_TRACKING_URI is set, but the run is not tracked"


def test_a_tracking_address_without_mlflow_is_a_warning(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A pipelines server sets it in the pods of tasks (DSPA's spec.mlflow), whose image has no
    mlflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    train(small(max_steps=2), tokens=tokens, **outputs(tmp_path))
    assert (tmp_path / "model" / "nudge.json").is_file()
    errors = capfd.readouterr().err
    assert errors.count(WARNING) == 1
    assert "mlflow is not installed; pip install 'nudge-lm[mlflow]', or unset it" in errors


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
        tracked = client.get_metric_history(run.info.run_id, kind)
        tracked.sort(key=lambda metric: metric.step)
        assert [metric.value for metric in tracked] == lines(tmp_path, kind)
    with pytest.raises(UserError, match="before step 2"):
        train(small(learning_rate=1e30, warmup_share=0.0), tokens=tokens, **outputs(tmp_path / "b"))
    statuses = sorted(run.info.status for run in client.search_runs(["0"]))
    assert statuses == ["FAILED", "FINISHED"]


@pytest.mark.long
@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "no-such-scheme://host", "https://["])
def test_an_mlflow_error_at_the_start_is_a_warning(
    address: str,
    small: Small,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train(small(max_steps=2), tokens=tokens, **outputs(tmp_path))
    assert (tmp_path / "model" / "nudge.json").is_file()
    assert WARNING in capfd.readouterr().err


@pytest.mark.long
def test_an_mlflow_error_during_training_is_a_warning(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "tracked").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def gone(*_: object, **__: object) -> None:
        raise OSError("the volume is gone")

    with monkeypatch.context() as patched:
        for name in ("log_batch", "set_terminated"):
            patched.setattr(mlflow.MlflowClient, name, gone)
        train(small(max_steps=2), tokens=tokens, **outputs(tmp_path))
    assert (tmp_path / "model" / "nudge.json").is_file()
    assert "is not tracked: OSError: the volume is gone" in capfd.readouterr().err
