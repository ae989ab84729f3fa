"""The runs of this machine as a list: what each one did, how it ended, and where its pages are.

Everything is read from the run's folder: recipe, events, result. A file that is missing or damaged
makes the run's state ``unreadable`` and never ends the list.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from nudge.components.common.core.errors import UserError, nearest
from nudge.components.common.core.nothing_new import NOTHING_NEW
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.recipe import read_yaml
from nudge.components.common.local.processes import locked
from nudge.components.common.local.state_file import Damaged, read_lines, read_object
from nudge.pipelines.local.run import BEFORE, EVENTS, Run, is_locked, named_time
from nudge.pipelines.step_state import StepState
from nudge.pipelines.steps import PIPELINE, SETTINGS

DECISION = "decision.json"
DECISIONS = ("approved", "rejected")
STATES = (
    *("running", "promoted", "awaiting approval", "approved", "rejected", "registered"),
    *("not better", "nothing new"),
    *("failed", "interrupted", "unreadable"),
)
"""How a run stands. ``registered``: better, and not promoted. ``interrupted``: its command ended
before the run did."""
RESULT_REMEDY = "delete the run with `nudge runs delete RUN`, or run its recipe again"


@dataclass(frozen=True)
class PastRun:
    """One run of this machine."""

    run_id: str
    folder: Path
    state: str
    recipe: str = ""
    started: datetime | None = None
    seconds: float | None = None
    """Wall time; None while it runs and if it was interrupted."""
    reason: str = ""
    """The verdict in words, or what failed."""
    model: str = ""
    version: str = ""
    bits_per_byte: float | None = None
    """The candidate's, on held-out text."""
    difference: float | None = None
    """Candidate minus the version that was served then, or minus the base model; negative is
    better."""
    steps: dict[str, StepState] = field(default_factory=dict, repr=False)
    result: dict[str, Any] = field(default_factory=dict, repr=False)
    """The object that `nudge run --json` printed; empty if the run did not end."""

    @property
    def spent(self) -> dict[str, Any]:
        """What the run used in total: core_hours, gpu_hours, kwh and cost, as far as known."""
        return _mapping(_mapping(self.result, "usage"), "total")

    def spent_on(self, step: str) -> dict[str, Any]:
        """The same for one of its steps."""
        return _mapping(_mapping(_mapping(self.result, "usage"), "steps"), step)

    @property
    def currency(self) -> str:
        """The currency of its costs; empty if its recipe has no prices."""
        return str(_mapping(self.result, "usage").get("currency") or "")

    @property
    def cost(self) -> dict[str, Any]:
        """What its candidate took to make, reused steps included (a plain `Cost`)."""
        return _mapping(self.result, "cost")

    @property
    def page(self) -> Path:
        """The run's own page, which links the reports of its steps."""
        return self.folder / "index.html"

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    def output(self, step: str, name: str) -> Path | None:
        """An artifact of one of its steps; None if the step did not end or it is gone."""
        path = Path(self.steps[step].outputs.get(name, "")) if step in self.steps else Path()
        return path if path != Path() and path.exists() else None

    def row(self) -> dict[str, Any]:
        """The run as plain values for a script."""
        return {
            "run_id": self.run_id,
            "recipe": self.recipe,
            "state": self.state,
            "started": self.started.isoformat(" ", "seconds") if self.started else None,
            "seconds": self.seconds,
            "model": self.model or None,
            "version": self.version or None,
            "bits_per_byte": self.bits_per_byte,
            "difference": self.difference,
            "core_hours": _number(self.spent, "core_hours"),
            "gpu_hours": _number(self.spent, "gpu_hours"),
            "cost": _number(self.spent, "cost"),
            "currency": self.currency or None,
            "reason": self.reason,
            "page": str(self.page) if self.page.is_file() else None,
            "folder": str(self.folder),
        }


def runs(home: Path) -> list[PastRun]:
    """Every run of a home, newest first."""
    folders = [path for path in (home / "runs").glob("[!.]*") if path.is_dir()]
    return [read_run(path) for path in sorted(folders, reverse=True)]


def find(home: Path, begun: str) -> PastRun:
    """The run whose id is, begins or ends with ``begun``; ``last`` is the newest one.

    Raises `UserError` if none or several fit.
    """
    names = sorted(path.name for path in (home / "runs").glob("[!.]*") if path.is_dir())
    if not names:
        raise UserError(f"there are no runs in {home}; `nudge run` starts one")
    if begun == "last":
        return read_run(home / "runs" / names[-1])
    fits = [begun] if begun in names else [name for name in names if name.startswith(begun)]
    fits = fits or [name for name in names if name.endswith(begun)]
    if len(fits) != 1:
        hint = f"it fits {', '.join(fits[-4:])}" if fits else nearest(begun, names[-20:])
        raise UserError(f"there is no single run {begun!r}; {hint} (`nudge runs` lists them)")
    return read_run(home / "runs" / fits[0])


def read_run(folder: Path) -> PastRun:
    """What is known about the run in a folder; never raises for a damaged file."""
    steps, started = _steps(folder)
    recipe = _recipe(folder)
    common: dict[str, Any] = {
        "run_id": folder.name,
        "folder": folder,
        "recipe": str(recipe.get("name") or ""),
        "model": str(recipe.get("model_name") or ""),
        "steps": steps,
        "started": started or named_time(folder.name),
    }
    if (folder / "lock").is_file() and is_locked(folder / "lock"):
        active = next((step for step in steps.values() if step.status == "running"), None)
        return PastRun(**common, state="running", reason=f"in {active.name}" if active else "")
    try:
        result = read_object(folder / "result.json", RESULT_REMEDY)
    except FileNotFoundError:
        failed = next((step for step in steps.values() if step.status == "failed"), None)
        reason = f"{failed.name}: {failed.error}" if failed else "its command was stopped or killed"
        return PastRun(**common, state="interrupted", reason=reason)
    except Damaged as error:
        return PastRun(**common, state="unreadable", reason=str(error))
    return PastRun(**{**common, **_decided(folder, _outcome(result))}, result=result)


def note_decision(folder: Path, state: str, by: str, at: str) -> None:
    """Keep with a run what a person decided about its version, "approved" or "rejected"."""
    write_atomic(folder / DECISION, json.dumps({"state": state, "by": by, "at": at}))


def _decided(folder: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a run, with the decision about its version if it awaited one."""
    try:
        decision = read_object(folder / DECISION, "delete it; the registry has the decision")
    except (FileNotFoundError, Damaged):
        return outcome
    state = decision.get("state")
    if outcome["state"] != "awaiting approval" or state not in DECISIONS:
        return outcome
    reason = f"{state} by {decision.get('by')} at {decision.get('at')}"
    return outcome | {"state": state, "reason": reason}


def ended(run: Run, result: dict[str, Any]) -> PastRun:
    """A run of this process that has ended with this result, whose lock it still has."""
    return PastRun(
        **{
            "run_id": run.run_id,
            "folder": run.folder,
            "recipe": run.recipe.name,
            "model": str(run.recipe.values.get("model_name") or ""),
            "steps": run.steps,
            "started": named_time(run.run_id),
            **_outcome(result),
        },
        result=result,
    )


def _outcome(result: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run that its result has; values of a wrong type count as missing."""
    raw = result.get("metrics")
    metrics: dict[str, Any] = raw if isinstance(raw, dict) else {}
    bits = {name: _number(of, "bits_per_byte") for name, of in metrics.items()}
    mine, other = bits.get("candidate"), bits.get("incumbent", bits.get("base"))
    reason, error = str(result.get("reason") or ""), result.get("error")
    if error:
        state, reason = "failed", str(error)
    elif result.get("awaiting_approval"):
        state = "awaiting approval"
    elif result.get("promoted"):
        state = "promoted"
    elif reason.startswith(NOTHING_NEW):
        state = "nothing new"
    else:
        state = "registered" if result.get("version") else "not better"
    found = {
        "state": state,
        "reason": reason,
        "seconds": _number(result, "seconds"),
        "version": str(result.get("version") or ""),
        "bits_per_byte": mine,
        "difference": None if mine is None or other is None else mine - other,
    }
    names = {"recipe": result.get("recipe"), "model": result.get("registered_model")}
    return found | {key: str(value) for key, value in names.items() if value}


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping below a key; empty if there is none, as in the result of an older nudge."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _number(values: Any, key: str) -> float | None:
    value = values.get(key) if isinstance(values, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _steps(folder: Path) -> tuple[dict[str, StepState], datetime | None]:
    """The steps by the run's events, and when the first of them began."""
    steps = {name: StepState(name) for name in PIPELINE}
    first: float | None = None
    for event in (line for name in (BEFORE, EVENTS) for line in read_lines(folder / name)):
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # of another version
            steps[event["step"]].apply(event)
            first = event["time"] if first is None else first
    if isinstance(first, int | float):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            return steps, datetime.fromtimestamp(first)
    return steps, None


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        values = read_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def delete(home: Path, run: PastRun) -> int:
    """Remove a run's folder; returns the bytes that its files had. What it registered, uploaded or
    serves stays. Raises `UserError` if the run is active."""
    with locked(home, "runs"):
        lock = run.folder / "lock"
        if lock.is_file() and is_locked(lock):
            raise UserError(f"{run.run_id} is active; stop it first (Ctrl-C in its terminal)")
        size = sum(path.lstat().st_size for path in run.folder.rglob("*") if path.is_file())
        gone = run.folder.with_name(f".{run.run_id}.deleted")
        run.folder.rename(gone)  # never seen half deleted
        shutil.rmtree(gone)
        return size


def curve(run: PastRun) -> list[tuple[int, float]]:
    """The training loss by step, in nats per token; empty if the run's history is gone."""
    history = run.output("train", "history")
    lines = read_lines(history / "metrics.jsonl") if history else []
    points = []
    for line in lines:
        step, loss = line.get("step"), _number(line, "loss")
        if isinstance(step, int) and loss is not None:
            points.append((step, loss))
    return points


def settings(run: PastRun) -> dict[str, Any]:
    """Every setting of a run with its default where the recipe is silent, by dotted key."""
    recipe = _recipe(run.folder)
    text = yaml.safe_dump(recipe)
    found: dict[str, Any] = {}
    for section, step in SETTINGS.items():
        try:
            values = dataclasses.asdict(step.read_settings(text))
        except UserError:  # a recipe of another version
            raw = recipe.get(section)
            values = raw if isinstance(raw, dict) else {}
        found |= dict(_flat(values, section))
    return found


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value
