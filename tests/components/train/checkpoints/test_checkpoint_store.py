"""Checkpoints in a failing object store, and on a full disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from nudge.components.common.core.errors import UserError
from nudge.components.train.record import TrainingLog
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import outputs, weights
from tests.conftest import Disk
from tests.faulty_proxy import FaultyProxy

REFUSALS = ("AccessDenied", "QuotaExceeded", "ExpiredToken")


class RefusingProxy(FaultyProxy):
    """Answers the next ``left`` checkpoint writes with 403 and ``code``."""

    def __init__(self, upstream: str, code: str, left: int) -> None:
        super().__init__(upstream, share=0.0)
        self.code, self.left = code, left

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method != "PUT" or "/step-" not in request.path or not self.left:
            return await super()._handle(request)
        await request.read()
        self.left -= 1
        text = f"<Error><Code>{self.code}</Code><Message>no</Message></Error>"
        return web.Response(status=403, text=text, content_type="application/xml")


Small = Callable[..., TrainSettings]


def test_checkpoints_survive_a_flaky_store(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    connected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    faulty_proxy: Callable[..., FaultyProxy],
) -> None:
    from nudge.components.common.clients.storage import s3_client
    from tests.objects import list_keys

    train(small(), tokens=tokens, **outputs(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        original, endpoint = TrainingLog.metric, connected["AWS_S3_ENDPOINT"]
        proxy = faulty_proxy(endpoint, share=0.15, seed=3, slow_s=0.01)
        patched.setenv("AWS_S3_ENDPOINT", proxy.url)

        def metric(self: TrainingLog, values: dict[str, float]) -> None:
            if values["step"] == 11 and "loss" in values:
                raise KeyboardInterrupt
            original(self, values)

        patched.setattr(TrainingLog, "metric", metric)
        settings = small(checkpoints="s3://nudge/checkpoints")
        with pytest.raises(KeyboardInterrupt):
            train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
        patched.setattr(TrainingLog, "metric", original)
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
        assert sum(proxy.counts.values()) > proxy.counts["passed"]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    keys = list_keys(s3_client(), "nudge", "checkpoints")
    assert sum(key.endswith("manifest.json") for key in keys) == 2


@pytest.mark.parametrize("code", REFUSALS)
def test_one_refused_checkpoint_is_a_warning(
    code: str,
    small: Small,
    tokens: Path,
    tmp_path: Path,
    connected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with RefusingProxy(connected["AWS_S3_ENDPOINT"], code, left=1) as proxy:
        monkeypatch.setenv("AWS_S3_ENDPOINT", proxy.url)
        settings = small(checkpoints="s3://nudge/checkpoints")
        train(settings, tokens=tokens, **outputs(tmp_path / "run"))
    assert proxy.left == 0
    errors = capfd.readouterr().err
    assert "step-000000003 failed: write s3://nudge/checkpoints/" in errors
    assert f"{code} from " in errors
    assert "retrying at the next checkpoint" in errors
    assert (tmp_path / "run" / "model" / "nudge.json").is_file()


def test_the_third_refusal_in_a_row_ends_the_training(
    small: Small,
    tokens: Path,
    tmp_path: Path,
    connected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with RefusingProxy(connected["AWS_S3_ENDPOINT"], "AccessDenied", left=99) as proxy:
        monkeypatch.setenv("AWS_S3_ENDPOINT", proxy.url)
        settings = small(checkpoints="s3://nudge/checkpoints", max_steps=40, epochs=99.0)
        with pytest.raises(UserError, match="step-000000009 failed: .*AccessDenied.*may not do"):
            train(settings, tokens=tokens, **outputs(tmp_path / "run"))
    assert capfd.readouterr().err.count("retrying at the next checkpoint") == 2
    assert not (tmp_path / "run" / "model").exists()


def test_a_missing_bucket_fails_before_training(
    small: Small, tokens: Path, tmp_path: Path, connected: dict[str, str]
) -> None:
    settings = small(checkpoints="s3://no-such/checkpoints")
    with pytest.raises(UserError, match="list s3://no-such/.*NoSuchBucket"):
        train(settings, tokens=tokens, **outputs(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "model").exists()


def test_three_checkpoints_on_a_full_disk_end_the_run(
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
    assert "retrying at the next checkpoint" in capfd.readouterr().err
    assert not (tmp_path / "cut" / "model").exists()
    assert not list((full / "checkpoints").glob("*/step-*"))
