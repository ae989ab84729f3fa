"""Everything that version 0.1 left on a laptop is read, continued and rolled back.

`written_by_0_1.tar.xz` is a folder in which version 0.1 (commit 4fb4de3) ran three times on a tiny
model, with a recipe, text and checkpoints: two versions were promoted, and the upload of the third
run failed. The recipe and the runs have absolute paths, so it is unpacked to the same folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nudge.components.common.core import guard

pytestmark = pytest.mark.long

ARCHIVE = Path(__file__).parent / "written_by_0_1.tar.xz"
FOLDER = Path("/tmp/nudge-written-by-0.1")
HOME = FOLDER / "home"


def nudge(*arguments: str, status: int = 0) -> str:
    command = [str(Path(sys.executable).with_name("nudge")), *arguments]
    environment = {**os.environ, "NUDGE_HOME": str(HOME)}
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def unpacked() -> Iterator[None]:
    FOLDER.mkdir()
    try:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(FOLDER, filter="data")
        yield
        nudge("services", "down")
    finally:
        shutil.rmtree(FOLDER)


def shares() -> dict[str, int]:
    rows: list[dict[str, Any]] = json.loads(nudge("models", "--json"))
    return {row["version"]: row["share"] for row in rows}
