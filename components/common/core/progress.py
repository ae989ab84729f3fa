"""Progress of long work: a bar on a terminal, plain lines in a pod, events for `nudge run`.

A step writes ``with progress("train", total=steps, unit="steps") as bar: bar.advance(1, loss=...)``
and does not know where it is shown. If the variable NUDGE_EVENTS names a file, each change is one
JSON line appended to it: ``{"time", "step", "event", "done", "total", "unit", "fields"}`` with
``event`` one of ``start``, ``progress``, ``end``, ``failed``. The step itself adds ``step_start``,
``step_end`` (``status`` done or reused, ``seconds``, ``outputs`` with their paths, ``results``) and
``step_failed`` (``error``).
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.core.environment import EVENTS
from nudge.components.common.core.sanitize import visible
from nudge.components.common.core.say import say
from nudge.components.common.local.state_file import read_lines

SHOWN = re.compile(r"(\w+): ([\d.e+]+)(?:/([\d.e+]+))? (\S+) ?(.*)")
"""A line of progress in a pod's log, such as ``train: 12/60 steps loss 2.31``."""

RESULTS = ": results "
"""Separates a step's name from its results, as JSON, in a pod's log."""

PLAIN_INTERVAL_S = 10.0
EVENT_INTERVAL_S = 0.2


class Progress:
    """The progress of one piece of work; `progress` opens and closes it."""

    def __init__(self, step: str, total: float | None, unit: str) -> None:
        self.step, self.total, self.unit = step, total, unit
        self.done: float = 0
        self.fields: dict[str, Any] = {}
        self._started = self._shown = time.monotonic()
        self._events = os.environ.get(EVENTS)
        self._bar = None if self._events or not sys.stderr.isatty() else _rich_bar(step, total)
        self._emit("start")

    def advance(self, amount: float = 1, **fields: Any) -> None:
        """Count ``amount`` more units as done; ``fields`` are metrics such as loss=2.31."""
        self.done += amount
        self.fields.update(fields)
        self._show()

    def note(self, **fields: Any) -> None:
        """Change what is shown without advancing, such as ``stage="loading model"``."""
        self.fields.update(fields)
        self._show(at_once=True)

    def _show(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=self.done, figures=figures(self.fields))
        interval = EVENT_INTERVAL_S if self._events else PLAIN_INTERVAL_S
        if not at_once and now - self._shown < interval and self.done != self.total:
            return
        self._shown = now
        if self._events:
            self._emit("progress")
        elif self._bar is None:
            of = f"/{self.total:g}" if self.total else ""
            say(f"{self.step}: {self.done:g}{of} {self.unit} {figures(self.fields)}")

    def close(self, failed: bool) -> None:
        if self._bar is not None:
            self._bar[0].stop()
        self._emit("failed" if failed else "end")

    def _emit(self, event: str) -> None:
        progress = {"done": self.done, "total": self.total, "unit": self.unit}
        emit_event(self.step, event, **progress, fields=self.fields)


def emit_event(step: str, event: str, **values: Any) -> None:
    """Append one JSON line to the file that NUDGE_EVENTS names; does nothing where it is unset."""
    if events := os.environ.get(EVENTS):
        line = json.dumps({"time": time.time(), "step": step, "event": event, **values}) + "\n"
        # One write in append mode: lines of steps that share the file never mix.
        with open(events, "ab", buffering=0) as file:
            file.write(line.encode())


def log_results(step: str, results: dict[str, Any]) -> None:
    """Write a step's small results to its log, for whoever follows a run on a cluster; does nothing
    where events tell them."""
    if not os.environ.get(EVENTS):
        say(f"{step}{RESULTS}{json.dumps(results)}")


def last_events() -> dict[str, dict[str, Any]]:
    """The last step_start, step_end or step_failed of each step; empty without NUDGE_EVENTS.

    A step whose last event is ``step_start`` runs still, or was killed.
    """
    path = os.environ.get(EVENTS)
    if not path or not os.path.isfile(path):
        return {}
    found = [each for each in read_lines(Path(path)) if {"step", "event"} <= each.keys()]
    return {each["step"]: each for each in found if str(each["event"]).startswith("step_")}


@contextlib.contextmanager
def progress(step: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
    """Show the progress of a piece of work while the block runs; ``total=None`` if unknown."""
    bar = Progress(step, total, unit)
    try:
        yield bar
    except BaseException:
        bar.close(failed=True)
        raise
    bar.close(failed=False)


def figures(fields: dict[str, Any]) -> str:
    """The figures beside a bar, such as ``loss 2.314 tokens/s 163``."""
    parts = []
    for name, value in fields.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.replace('_per_s', '/s')} {shown}")
    return visible("  ".join(parts))


def _rich_bar(step: str, total: float | None) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    )
    bar.start()
    return bar, bar.add_task(step, total=total, figures="")
