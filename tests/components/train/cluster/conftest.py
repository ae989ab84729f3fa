"""Fixtures of the launchers: each engine, and a stand-in cluster with the rights of a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.train.cluster import following
from nudge.components.train.cluster import launch as launching
from nudge.components.train.cluster.jobs import Engine
from nudge.components.train.settings import LaunchSettings, TrainSettings
from tests.kubernetes_api import KubernetesApi


@pytest.fixture(params=["trainjob", "rayjob"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return launching.ENGINES[request.param]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.setattr(following, "POLL_S", 0.05)
    monkeypatch.setenv("NUDGE_RUN_ID", "run-1")
    with KubernetesApi(role="nudge-runner") as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        yield api


@pytest.fixture
def settings(engine: Engine, small: Callable[..., TrainSettings], tmp_path: Path) -> TrainSettings:
    return on_cluster(engine, small, tmp_path)


def on_cluster(
    engine: Engine, small: Callable[..., TrainSettings], tmp_path: Path, **more: Any
) -> TrainSettings:
    values = {"exchange": str(tmp_path / "shared"), "nodes": 1, "gpus_per_node": 0, **more}
    return small(launcher=engine.KIND.name.lower(), cluster=LaunchSettings(**values))
