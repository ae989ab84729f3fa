"""One finished run that several files look at: it takes a tenth of the time of all tests here."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.workspace import Workspace
from tests.security.watch import Watch

FOREIGN = {
    "GITHUB_TOKEN": "canary5Xk2TokenOfAnotherProgram",
    "MY_DATABASE_PASSWORD": "canary5Xk2PasswordOfADatabase",
    "OPENAI_API_KEY": "canary5Xk2KeyOfAnotherService",
}
"""Secrets of other programs, which no process of nudge needs."""
OWN = {
    "HF_TOKEN": "hf_canary5Xk2TokenOfTheHub",
    "NUDGE_PIPELINES_TOKEN": "sha256~canary5Xk2TokenOfTheServer",
}
"""Secrets that a step may need, and no server."""
CANARIES = {**FOREIGN, **OWN}
WORDS = ["Paris", "Seine", "tower", "bridge", "museum", "river", "garden", "street", "bread"]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Workspace]:
    """A folder with a recipe, a text that a tiny model learns in seconds, and running services."""
    folder = tmp_path_factory.mktemp("end_to_end")
    generator = random.Random(1)
    with (folder / "text.jsonl").open("w") as file:
        for number in range(120):
            text = " ".join(generator.choice(WORDS) for _ in range(50)) + "."
            print(json.dumps({"id": number, "text": text}), file=file)
    probe = {"prompt": "Paris Seine", "target": " tower"}
    recipe = {
        "name": "tiny",
        "base_model": str(tiny_model),
        "model_name": "tiny",
        "seed": 1,
        "ingest": {"data_uri": str(folder / "text.jsonl"), "validation_share": 0.2},
        "train": {
            "max_steps": 60,
            "sequence_length": 64,
            "batch_sequences": 4,
            "learning_rate": 0.01,
            "watch": probe,
        },
        "evaluate": {"window": 64, "stride": 32, "probes": [probe], "prompts": ["Paris"]},
        "deploy": {"smoke_prompt": "Paris"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    workspace = Workspace(folder, tiny_model, folder / "tiny.yaml")
    # Otherwise they would belong to the first run and outlive it.
    started = workspace.nudge("services", "up", **CANARIES)
    assert started.returncode == 0, started.stderr
    yield workspace
    workspace.nudge("services", "down")


@pytest.fixture(scope="session")
def watched(workspace: Workspace) -> tuple[dict[str, Any], Watch, str]:
    """The first run, with secrets in its environment: its result, its processes, and its output."""
    running = workspace.start(**CANARIES)
    with Watch(running.pid, workspace.home) as watch:
        output, errors = running.communicate(timeout=400)
    assert running.returncode == 0, errors
    assert "Traceback" not in errors
    return dict(json.loads(output)), watch, output + errors


@pytest.fixture(scope="session")
def first(watched: tuple[dict[str, Any], Watch, str]) -> dict[str, Any]:
    """The result of the first run; its version is served."""
    return watched[0]
