"""Scheduled retraining of a tiny model, night by night, shared by several tests.

Secrets are planted wherever a night could pick one up: in its environment, beside the recipe, and
in what documents carry beside their text.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

NUDGE = str(Path(sys.executable).parent / "nudge")
WORDS = {
    "first": ["Paris", "Seine", "tower", "bridge", "museum", "river", "garden", "street"],
    "second": ["lemon", "salt", "pepper", "flour", "butter", "sugar", "apple", "onion"],
    "third": ["violin", "drum", "horn", "flute", "cello", "harp", "piano", "organ"],
    "fourth": ["granite", "basalt", "marble", "slate", "quartz", "chalk", "flint", "gneiss"],
}
"""The words of each night's text; no model of an earlier night has seen them."""

ENVIRONMENT = {
    "HF_TOKEN": "hf_canary7Qe1VariableOfTheHub",
    "NUDGE_PIPELINES_TOKEN": "sha256~canary7Qe1TokenOfTheServer",
    "MY_DATABASE_PASSWORD": "canary7Qe1PasswordOfAnotherProgram",
}
BESIDE = {".env": "canary7Qe1FileBesideTheRecipe", "token.txt": "canary7Qe1TokenBesideTheRecipe"}
METADATA = "canary7Qe1KeyInTheDocumentsMetadata"


class Nights:
    """A folder with the recipe and the text of all nights so far; ``home`` is what they leave.

    `go_by` lets them come: a first one, one with nothing new, one that fails when its model is to
    be uploaded, the same again, and two with new text.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.home, self.model = folder, folder / "home", model
        self.results: dict[str, dict[str, Any]] = {}
        """Each night's result, by its name."""
        self.versions: dict[str, dict[str, dict[str, Any]]] = {}
        """After each night, the rows of ``nudge models`` by version."""
        self._shown: list[str] = []
        self._environment = {**os.environ, **ENVIRONMENT, "NUDGE_HOME": str(self.home)}
        self._random = random.Random(1)
        for name, secret in BESIDE.items():
            (folder / name).write_text(f"SECRET={secret}\n")
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
            "evaluate": {
                "window": 64,
                "stride": 32,
                "guards": [],
                "probes": [probe],
                "prompts": [],
            },
            "register": {"keep_versions": 1},
            "deploy": {"smoke_prompt": "Paris"},
        }
        (folder / "nightly.yaml").write_text(yaml.safe_dump(recipe))

    def go_by(self) -> None:
        """Raises AssertionError if a night ends with another status than it should."""
        self._add_text("first")
        self._night("first")
        self._night("same")
        self._add_text("second")
        self._night("failed", "--set", "upload.target=s3://nowhere/models", status=1)
        self._night("second")
        for name in ("third", "fourth"):
            self._add_text(name)
            self._night(name)
        (self.home / "shown.txt").write_text("\n".join(self._shown))

    def _add_text(self, name: str) -> None:
        with (self.folder / f"{name}.jsonl").open("w") as file:
            for number in range(120):
                text = " ".join(self._random.choice(WORDS[name]) for _ in range(50)) + "."
                more = {"api_key": METADATA, "author": {"key": METADATA}}
                print(json.dumps({"id": number, "text": text, **more}), file=file)

    def command(self, *arguments: str, status: int = 0) -> str:
        """What ``nudge`` prints on stdout; raises AssertionError if it ends with another status."""
        ended = subprocess.run(
            [NUDGE, *arguments],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
        )
        self._shown += [ended.stdout, ended.stderr]
        assert ended.returncode == status, ended.stderr
        return ended.stdout

    def _night(self, name: str, *arguments: str, status: int = 0) -> None:
        printed = self.command("run", "nightly.yaml", "--json", *arguments, status=status)
        self.results[name] = json.loads(printed)
        rows = json.loads(self.command("models", "--json"))
        self.versions[name] = {row["version"]: row for row in rows}
