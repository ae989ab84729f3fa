"""What tests of several rooms use."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in ("NUDGE_HOME", "NUDGE_EVENTS", "NUDGE_REUSE", "NUDGE_RUN_ID", "NUDGE_REGISTRY_URL"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model's folder."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own for embedded services; whatever was started there is stopped."""
    from nudge.pipelines.local import services

    folder = tmp_path / "home"
    monkeypatch.setenv("NUDGE_HOME", str(folder))
    yield folder
    services.down(folder)
