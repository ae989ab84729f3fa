"""No secret is in anything that a run leaves: canaries are planted, then every byte is searched."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

NUDGE = str(Path(sys.executable).parent / "nudge")
ROOT = Path(__file__).parents[2]
WORDS = ["Paris", "Seine", "tower", "bridge", "museum", "river", "garden", "street", "bread"]

ENVIRONMENT = {
    "HF_TOKEN": "hf_canary7Qe1VariableOfTheHub",
    "NUDGE_PIPELINES_TOKEN": "sha256~canary7Qe1TokenOfTheServer",
    "MY_DATABASE_PASSWORD": "canary7Qe1PasswordOfAnotherProgram",
}
BESIDE = {".env": "canary7Qe1FileBesideTheRecipe", "token.txt": "canary7Qe1TokenBesideTheRecipe"}
METADATA = "canary7Qe1KeyInTheDocumentsMetadata"


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """The home of two runs: one that ended well and one that failed."""
    folder = tmp_path_factory.mktemp("canaries")
    for name, secret in BESIDE.items():
        (folder / name).write_text(f"SECRET={secret}\n")
    generator = random.Random(1)
    with (folder / "text.jsonl").open("w") as file:
        for number in range(60):
            text = " ".join(generator.choice(WORDS) for _ in range(50)) + "."
            record = {"id": number, "text": text, "api_key": METADATA, "author": {"key": METADATA}}
            print(json.dumps(record), file=file)
    recipe = {
        "name": "canary",
        "base_model": str(tiny_model),
        "model_name": "canary",
        "ingest": {"data_uri": str(folder / "text.jsonl"), "validation_share": 0.2},
        "train": {
            "max_steps": 60,
            "sequence_length": 64,
            "batch_sequences": 4,
            "learning_rate": 0.01,
        },
        "evaluate": {"window": 64, "stride": 32, "max_documents": 8, "prompts": ["Paris"]},
        "deploy": {"smoke_prompt": "Paris"},
    }
    (folder / "canary.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, **ENVIRONMENT, "NUDGE_HOME": str(folder / "home")}

    def nudge(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [NUDGE, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )

    well = nudge("run", "canary.yaml", "--json")
    assert well.returncode == 0, well.stderr
    # Of another name: nothing is served under it, so that the same model gets to the upload.
    changed = ["--set", "model_name=other", "--set", "upload.target=s3://nowhere/models"]
    failed = nudge("run", "canary.yaml", "--json", *changed)
    assert failed.returncode == 1
    shown = [ended.stdout + ended.stderr for ended in (well, failed, nudge("models"))]
    (folder / "home" / "shown.txt").write_text("\n".join(shown))
    yield folder / "home"
    nudge("services", "down")


def found_in(folder: Path, secrets: list[str], but: set[Path]) -> list[str]:
    """The files below a folder, packed ones unpacked, that hold one of the secrets."""
    needles = [secret.encode() for secret in secrets]
    told = []
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and each not in but):
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if any(needle in content for needle in needles):
            told.append(str(path.relative_to(folder)))
    return told


@pytest.mark.long
def test_nothing_that_a_run_leaves_holds_a_secret(left: Path) -> None:
    credentials = left / "services" / "credentials"
    keys = json.loads(credentials.read_text())
    secrets = [*ENVIRONMENT.values(), *BESIDE.values(), METADATA, keys["AWS_SECRET_ACCESS_KEY"]]
    assert found_in(left, secrets, but={credentials}) == []
    assert credentials.stat().st_mode & 0o077 == 0
    for place in ("runs", "model-registry", "object-store", "services", "reuse"):
        assert any((left / place).rglob("*")), place  # the search had something to search


@pytest.mark.long
def test_the_search_would_find_one(left: Path) -> None:
    planted = left / "runs" / "planted.log.gz"
    planted.write_bytes(gzip.compress(f"token {METADATA}".encode()))
    try:
        assert found_in(left, [METADATA], but=set()) == ["runs/planted.log.gz"]
    finally:
        planted.unlink()


def test_nothing_compiled_holds_what_is_in_the_environment(tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT, "AWS_SECRET_ACCESS_KEY": METADATA}
    command = [NUDGE, "compile", "--into", str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert list(tmp_path.rglob("*.yaml"))
    assert found_in(tmp_path, [*ENVIRONMENT.values(), METADATA], but=set()) == []
