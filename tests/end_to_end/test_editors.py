"""pyright and mypy follow every import of nudge: in the checkout, and from its wheel elsewhere."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_install import ROOT, installation, uv, wheels

__all__ = ["wheels"]  # the fixture
pytestmark = pytest.mark.long

PYRIGHT = "pyright[nodejs]==1.1.414"  # Node.js comes from PyPI too
NOT_SET_UP = {
    *("ray", "mlflow", "lm_eval"),
    *("datasets", "datatrove", "matplotlib", "orjson", "spacy", "torch_npu", "xxhash"),
}
"""What `make setup` does not install: extras of their own, and the benchmarks' peers."""

USER = """
from nudge.components.common.artifacts.corpus import read_corpus
from nudge.components.ingest.settings import IngestSettings
from nudge.pipelines.recipes import load

name: str = load("eiffel").name
workers: int = IngestSettings(data_uri="text").workers
wrong: int = load("eiffel").name
read_corpus("not a path")
"""


@pytest.fixture(scope="module")
def pyright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pyright") / "venv"
    uv("venv", "--python", sys.executable, folder)
    uv("pip", "install", "--python", folder / "bin" / "python", PYRIGHT)
    return folder / "bin" / "pyright"


def problems(pyright: Path, *arguments: str | Path, cwd: Path) -> list[dict[str, Any]]:
    """What pyright reports: each with the keys ``rule``, ``message`` and ``file``."""
    command = [str(pyright), "--outputjson", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["generalDiagnostics"]
    return found


def test_every_import_of_the_checkout_resolves(pyright: Path) -> None:
    found = problems(pyright, "--pythonpath", sys.executable, cwd=ROOT)
    missing = [each for each in found if each.get("rule") == "reportMissingImports"]
    names = {each["message"].split('"')[1].partition(".")[0] for each in missing}
    assert names <= NOT_SET_UP


def test_types_come_with_the_wheel(pyright: Path, wheels: Path, tmp_path: Path) -> None:
    python = installation(tmp_path / "venv", wheels, "data")
    user = tmp_path / "user"
    user.mkdir()
    (user / "user.py").write_text(USER)
    found = problems(pyright, "--pythonpath", python, "user.py", cwd=user)
    assert [each["rule"] for each in found] == ["reportAssignmentType", "reportArgumentType"], found
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py"]
    done = subprocess.run(command, cwd=user, capture_output=True, text=True, timeout=600)
    assert "user.py:8: error: Incompatible types in assignment" in done.stdout
    assert 'user.py:9: error: Argument 1 to "read_corpus" has incompatible type' in done.stdout
    assert "Found 2 errors" in done.stdout
