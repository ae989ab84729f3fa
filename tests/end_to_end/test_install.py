"""`pip install .` without extras: each subcommand works or names the extra to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long

SUBCOMMANDS = (
    *("run", "ingest", "step", "recipes", "services", "models", "promote", "split", "rollback"),
    *("register", "compile", "upload", "submit", "schedule", "doctor"),
)
WORKS = ("--version", "recipes", "doctor")
NEEDS_EXTRAS = (
    "run",
    "run --until ingest",
    "run --use-env-services",
    "ingest --json",
    "step ingest --into made",
    "step tokenize --corpus . --into made",
    "step train --tokens . --into made",
    "step evaluate --corpus . --model . --history . --into made",
    "step fetch --model-uri s3://bucket/model --into made",
    "step upload --model . --version v1",
    "step register --model . --evaluation . --uri s3://a --version v1 --run-id r",
    "step deploy --registered-model m --version v1",
    "services up",
    "services status",
    "services down",
    "models --json",
    "promote v1",
    "split v1=100",
    "rollback",
    "register s3://bucket/models/m/v1",
    "compile --into made",
    "upload --url http://127.0.0.1:1",
    "submit --url http://127.0.0.1:1",
    "schedule list --url http://127.0.0.1:1",
    "schedule pause nightly --url http://127.0.0.1:1",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with nudge's wheel and its base dependencies; gives the command."""
    folder = tmp_path_factory.mktemp("install")
    uv = Path(sys.executable).with_name("uv")
    wheels, python = folder / "wheels", folder / "venv" / "bin" / "python"
    for command in (
        ["build", "--wheel", "-o", str(wheels), str(ROOT)],
        ["venv", "--python", sys.executable, str(folder / "venv")],
    ):
        subprocess.run([str(uv), *command], check=True, capture_output=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    install = [str(uv), "pip", "install", "--python", str(python), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    return python.with_name("nudge")


def run(command: Path, arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    dropped = ("VIRTUAL_ENV", "PYTHONPATH", "AWS_S3_ENDPOINT", "NUDGE_REGISTRY_URL")
    environment = {name: each for name, each in os.environ.items() if name not in dropped}
    environment["NUDGE_HOME"] = str(folder / "home")
    return subprocess.run(
        [str(command), *arguments.split()],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_subcommand_has_help_without_any_extra(installed: Path, tmp_path: Path) -> None:
    for name in SUBCOMMANDS:
        done = run(installed, f"{name} --help", tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_what_needs_no_extra_works(installed: Path, tmp_path: Path) -> None:
    for arguments in WORKS:
        done = run(installed, arguments, tmp_path)
        assert "Traceback" not in done.stderr, arguments
        assert done.stdout, arguments
        assert done.returncode == (1 if arguments == "doctor" else 0), arguments


def test_what_needs_an_extra_names_it(installed: Path, tmp_path: Path) -> None:
    for arguments in NEEDS_EXTRAS:
        done = run(installed, arguments, tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr, arguments
        assert "pip install 'nudge-lm[" in done.stderr, (arguments, done.stderr)
