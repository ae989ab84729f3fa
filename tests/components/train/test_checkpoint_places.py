"""Checkpoints in an object store that fails, and on a disk that fills."""

from collections.abc import Callable
from pathlib import Path

import pytest
from nudge.components.common.errors import UserError
from nudge.components.train.record import Record
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train

from tests.components.train.conftest import outputs, weights
from tests.conftest import Disk
from tests.faulty_proxy import FaultyProxy

Small = Callable[..., TrainSettings]


def test_checkpoints_through_a_store_that_fails(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    connected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    faulty_proxy: Callable[..., FaultyProxy],
) -> None:
    from nudge.components.common.storage import list_keys, s3_client

    train(small(), tokens=tokens, **outputs(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        kept, endpoint = Record.metric, connected["AWS_S3_ENDPOINT"]
        proxy = faulty_proxy(endpoint, share=0.15, seed=3, slow_s=0.01)
        patched.setenv("AWS_S3_ENDPOINT", proxy.url)

        def metric(self: Record, values: dict[str, float]) -> None:
            if values["step"] == 11 and "loss" in values:
                raise KeyboardInterrupt
            kept(self, values)

        patched.setattr(Record, "metric", metric)
        settings = small(checkpoints="s3://nudge/checkpoints")
        with pytest.raises(KeyboardInterrupt):
            train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
        patched.setattr(Record, "metric", kept)
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
        assert sum(proxy.counts.values()) > proxy.counts["passed"]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    keys = list_keys(s3_client(), "nudge", "checkpoints")
    assert sum(key.endswith("manifest.json") for key in keys) == 2


def test_a_bucket_that_is_not_there_ends_before_training(
    small: Small, tokens: Path, tmp_path: Path, connected: dict[str, str]
) -> None:
    settings = small(checkpoints="s3://no-such/checkpoints")
    with pytest.raises(UserError, match="list the checkpoints at s3://no-such/.*NoSuchBucket"):
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "model").exists()


def test_a_disk_too_full_for_three_checkpoints_ends_the_run(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    disk: Disk,
    capfd: pytest.CaptureFixture[str],
) -> None:
    full = disk.resize(100)
    settings = small(checkpoints=str(full / "checkpoints"), max_steps=40, epochs=99.0)
    with pytest.raises(UserError, match="step-000000009 failed: no space is left there"):
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert "trying again later" in capfd.readouterr().err
    assert not (tmp_path / "cut" / "model").exists()
    assert not list((full / "checkpoints").glob("*/step-*"))
