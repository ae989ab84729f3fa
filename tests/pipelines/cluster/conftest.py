"""A server that holds every request against the real API, and the command that asks it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from nudge.pipelines.cli.main import main
from nudge.pipelines.cluster import runs
from tests.pipelines.cluster.pipelines_server import Pipelines, serving

NIGHTLY = {
    "name": "nightly",
    "recipe": "eiffel",
    "cron": "0 30 2 * * *",
    "parameters": {"gpu_count": "0"},
}


@pytest.fixture
def state() -> Pipelines:
    return Pipelines()


@pytest.fixture
def url(state: Pipelines, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", state.token)
    monkeypatch.setattr(runs, "POLL_S", 0.0)
    monkeypatch.setattr(runs.follow, "__defaults__", (0.0,))
    with serving(state) as address:
        monkeypatch.setenv("NUDGE_PIPELINES_URL", address)
        yield address
    assert state.faults == []


def nudge(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def schedule_file(folder: Path, **changes: Any) -> str:
    path = folder / "schedule.yaml"
    path.write_text(yaml.safe_dump({**NIGHTLY, **changes}))
    return str(path)
