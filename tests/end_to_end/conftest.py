"""One finished run that several files look at: it takes a tenth of the time of all tests here."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.workspace import Workspace

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
    started = workspace.nudge("services", "up")
    assert started.returncode == 0, started.stderr
    yield workspace
    workspace.nudge("services", "down")


@pytest.fixture(scope="session")
def first(workspace: Workspace) -> dict[str, Any]:
    """The result of the first run; its version is served."""
    return workspace.run()
