"""The state of a run on this machine: its folder, its lock, and whether it is resumed."""

import fcntl
import os
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from nudge.components.common.core.provenance import code_fingerprint
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.sanitize import masked
from nudge.components.common.local.processes import locked
from nudge.components.common.local.state_file import Damaged, read_lines, read_object
from nudge.pipelines.local import temporary
from nudge.pipelines.recipes import Recipe
from nudge.pipelines.step_state import StepState
from nudge.pipelines.steps import PIPELINE, STEPS

TIME = "%Y%m%d-%H%M%S"
"""The form of the time in a run's name."""
EVENTS, BEFORE = "events.jsonl", "events-before.jsonl"
"""The events of a run's steps; those from before it was resumed are in a file of their own."""
RECIPE = "recipe.yaml"
"""The run's recipe, in which the credentials of URIs are masked."""
PUBLISHING = tuple(name for name in PIPELINE if STEPS[name].publishes)
"""The steps that change what others see; a run that was interrupted in one of them is resumed."""


@dataclass
class Run:
    """A run of the pipeline on this machine, with its folder."""

    recipe: Recipe
    run_id: str
    folder: Path
    steps: dict[str, StepState]
    seconds: float = 0.0
    exit_status: int = 0
    continued: bool = False
    """Whether an earlier command started it."""
    trained: str = ""
    """The facts about the model that it trained then."""
    lock: Any = None
    """The open lock file, which stays locked while the run's command is running."""

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    @property
    def events(self) -> Path:
        return self.folder / EVENTS

    @property
    def failed(self) -> StepState | None:
        """The step that failed; None if none did."""
        return next((step for step in self.steps.values() if step.status == "failed"), None)


def begin(recipe: Recipe, home: Path, *, fresh: bool = False) -> Run:
    """Create a run with its own folder, named after the time and a few random digits.

    If the last run of this recipe with this code was interrupted or failed after it had begun to
    publish its model, that run is returned: it finishes under its own name what a new run would
    leave half done. `follow` finds out whether its model is still the same. ``fresh`` always
    creates a new run.
    """
    with locked(home, "runs"):
        for lock in temporary.left_behind(home):
            if not is_locked(lock):
                temporary.remove_left_behind(lock)
        interrupted = None if fresh else _interrupted(recipe, home)
        if interrupted is not None:
            return interrupted
        run_id = f"{_next_time(home)}-{secrets.token_hex(2)}"
        folder = home / "runs" / run_id
        folder.mkdir(parents=True)
        write_atomic(folder / RECIPE, masked(recipe.text))
        write_atomic(folder / "code", code_fingerprint())
        return _run(recipe, folder)


def _next_time(home: Path) -> str:
    """The time now as a run's name begins, but always after the newest run's: neither two runs in
    one second nor a clock that was set back change which run is the last one."""
    now = datetime.now().replace(microsecond=0)
    begun = [time for path in (home / "runs").glob("*") if (time := named_time(path.name))]
    return f"{max([now, *(time + timedelta(seconds=1) for time in begun)]):{TIME}}"


def named_time(run_id: str) -> datetime | None:
    """When a run was begun, by its name; None for another name."""
    try:
        return datetime.strptime(run_id[:15], TIME)
    except ValueError:
        return None


def under_way(home: Path) -> list[str]:
    """The ids of the runs whose command is running."""
    with locked(home, "runs"):
        return [
            path.parent.name for path in sorted((home / "runs").glob("*/lock")) if is_locked(path)
        ]


def is_locked(lock: Path) -> bool:
    """Whether the command of the run with this lock file is running."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _run(recipe: Recipe, folder: Path) -> Run:
    run = Run(recipe, folder.name, folder, {name: StepState(name) for name in PIPELINE})
    run.lock = (folder / "lock").open("w")
    fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return run


def _interrupted(recipe: Recipe, home: Path) -> Run | None:
    """The last run of a recipe, to be resumed; None if it is active or ended well."""
    for folder in sorted((home / "runs").glob("*"), reverse=True):
        known = folder / RECIPE
        # An older nudge did not mask credentials there.
        same_as = (masked(recipe.text).encode(), recipe.text.encode())
        if not known.is_file() or known.read_bytes() not in same_as:
            continue
        code = folder / "code"
        same = code.is_file() and code.read_bytes() == code_fingerprint().encode()
        events = _all_events(folder)
        if not same or not _half_published(folder, events):
            return None
        try:
            run = _run(recipe, folder)
        except BlockingIOError:
            return None
        if run.events.is_file():
            with (folder / BEFORE).open("ab") as before:
                before.write(run.events.read_bytes())
            run.events.unlink()
        run.continued = True
        ends = [each for each in events if each["event"] == "step_end" and each["step"] == "train"]
        run.trained = facts(ends[0].get("outputs", {})) if ends else ""
        return run
    return None


def _all_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run's steps, including those from before it was resumed."""
    found = [each for name in (BEFORE, EVENTS) for each in read_lines(folder / name)]
    return [each for each in found if {"step", "event"} <= each.keys()]


def _half_published(folder: Path, events: list[dict[str, Any]]) -> bool:
    if not any(event["step"] in PUBLISHING[:-1] for event in events):
        return False
    # If the upload refused the model, the run may have a different one by now: do not retry it.
    uploads = [event["event"] for event in events if event["step"] == "upload"]
    if "step_failed" in uploads[-1:]:
        return False
    try:
        return read_object(folder / "result.json", "").get("error") is not None
    except (FileNotFoundError, Damaged):
        return True


def facts(outputs: dict[str, str]) -> str:
    """The text of a trained model's nudge.json (its lineage and the sha256 of its weights); empty
    if its folder is gone."""
    path = Path(outputs.get("model") or os.devnull) / "nudge.json"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
