"""A folder in which `nudge` runs, with services of its own."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUDGE = str(Path(sys.executable).parent / "nudge")
RECIPE = Path(__file__).parent / "tiny.yaml"


class Workspace:
    """``folder`` is the current directory; ``home`` in it is NUDGE_HOME."""

    def __init__(self, folder: Path, model: Path, recipe: Path = RECIPE) -> None:
        self.folder, self.model, self.recipe = folder, model, recipe
        self.home = folder / "home"

    def nudge(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [NUDGE, *arguments],
            cwd=self.folder,
            env={**os.environ, "NUDGE_HOME": str(self.home), **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )

    def command(self, *arguments: str) -> list[str]:
        base = f"base_model={self.model}"
        return [NUDGE, "run", str(self.recipe), "--json", "--set", base, *arguments]

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env={**os.environ, "NUDGE_HOME": str(self.home), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs ignore SIGINT, and their children inherit that.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        running = self.start(*arguments)
        output, errors = running.communicate(timeout=400)
        assert running.returncode == status, errors
        assert "Traceback" not in errors
        return dict(json.loads(output))

    def folders(self) -> set[Path]:
        return set((self.home / "runs").glob("*"))

    def page(self, result: dict[str, Any]) -> str:
        return (self.home / "runs" / result["run_id"] / "summary.md").read_text()


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in result["steps"]}


def eventually(what: Callable[[], Any], timeout_s: float = 100) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come true")
