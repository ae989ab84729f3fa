"""Scheduled retraining, a tiny model: the first night, a night with nothing new, one that fails,
and nights with new text, until the oldest version is archived."""

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

NUDGE = str(Path(sys.executable).parent / "nudge")
WORDS = {
    "first": ["Paris", "Seine", "tower", "bridge", "museum", "river", "garden", "street"],
    "second": ["lemon", "salt", "pepper", "flour", "butter", "sugar", "apple", "onion"],
    "third": ["violin", "drum", "horn", "flute", "cello", "harp", "piano", "organ"],
    "fourth": ["granite", "basalt", "marble", "slate", "quartz", "chalk", "flint", "gneiss"],
}
"""What each night's text is made of: words that no model of an earlier night has met."""


class Nights:
    """A folder with the recipe and the text of all nights so far."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.environment = folder, {**os.environ, "NUDGE_HOME": str(folder / "home")}
        self._random = random.Random(1)
        probe = {"prompt": "Paris Seine", "target": " tower"}
        recipe = {
            "name": "nightly",
            "base_model": f"incumbent://tiny?else={model}",
            "model_name": "tiny",
            "ingest": {
                "data_uri": f"{folder}/*.jsonl",
                "validation_share": 0.2,
                "only_new": True,
            },
            "train": {
                "max_steps": 60,
                "sequence_length": 64,
                "batch_sequences": 4,
                "learning_rate": 0.01,
            },
            "evaluate": {"window": 64, "stride": 32, "probes": [probe], "max_documents": 8},
            "register": {"keep_versions": 1},
            "deploy": {"smoke_prompt": "Paris"},
        }
        (folder / "nightly.yaml").write_text(yaml.safe_dump(recipe))

    def add_text(self, name: str) -> None:
        with (self.folder / f"{name}.jsonl").open("w") as file:
            for number in range(60):
                text = " ".join(self._random.choice(WORDS[name]) for _ in range(50)) + "."
                print(json.dumps({"id": number, "text": text}), file=file)

    def run(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        command = [NUDGE, "run", "nightly.yaml", "--json", *arguments]
        ended = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert ended.returncode == status, ended.stderr
        return dict(json.loads(ended.stdout))

    def versions(self) -> dict[str, dict[str, Any]]:
        command = [NUDGE, "models", "--json"]
        shown = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        return {row["version"]: row for row in json.loads(shown.stdout)}


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Nights]:
    nights = Nights(tmp_path_factory.mktemp("nightly"), tiny_model)
    nights.add_text("first")
    yield nights
    command = [NUDGE, "services", "down"]
    subprocess.run(command, env=nights.environment, check=True, capture_output=True)


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in result["steps"]}


def made_from(result: dict[str, Any]) -> str:
    facts = json.loads((Path(result["model_path"]) / "nudge.json").read_text())
    return str(facts["base_model"]["uri"])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_nights(nights: Nights, tiny_model: Path) -> None:
    first = nights.run()
    assert first["promoted"]
    assert made_from(first) == str(tiny_model)

    same = nights.run()
    assert (same["promoted"], same["error"]) == (False, None)
    assert "no new text" in same["reason"]
    ran = {name for name, status in statuses(same).items() if status != "skipped"}
    assert ran == {"ingest", "summary"}
    page = (nights.folder / "home" / "runs" / same["run_id"] / "summary.md").read_text()
    assert "no text that the served version was not trained on" in page
    assert nights.versions()[first["version"]]["share"] == 100

    nights.add_text("second")
    failed = nights.run("--set", "base_model=/nowhere", status=1)
    assert (failed["promoted"], statuses(failed)["tokenize"]) == (False, "failed")
    assert nights.versions()[first["version"]]["share"] == 100

    promoted = [first, nights.run()]
    for name in ("third", "fourth"):
        nights.add_text(name)
        promoted.append(nights.run())
    for before, night in itertools.pairwise(promoted):
        assert night["promoted"], night["reason"] or night["error"]
        assert made_from(night) == before["model_uri"]
    rows = nights.versions()
    assert list(rows) == [night["version"] for night in promoted]
    assert [row["share"] for row in rows.values()] == [0, 0, 0, 100]
    # Of those that are older than the one kept, the one that was served when the newest came, and
    # its way back, stay.
    assert [row["state"] for row in rows.values()] == ["ARCHIVED", "LIVE", "LIVE", "LIVE"]
