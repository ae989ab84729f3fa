"""Run the checks in worker processes, watch their time, and write one JSON file and one page."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nudge.components.common.core.environment import HOME
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import write_atomic, write_manifest
from nudge.components.common.local.child_environment import MODEL_CHILD, child_environment
from nudge.pipelines.gpu_check.checks import Outcome
from nudge.pipelines.gpu_check.page import render

COMMAND = "nudge gpu-check"
FORMAT, VERSION = "nudge.gpu_check", 1
RESULT, PAGE = "gpu-check.json", "gpu-check.html"
LIMIT_S = 8 * 60.0
"""Checks that have not started by then are skipped, and one that runs is stopped."""
RESERVE_S = 15.0
"""Seconds of that which no check may use."""
POLL_S = 0.1
LOG_LINES = 25


@dataclass
class Report:
    """What the JSON file and the page contain."""

    device: str
    started: str
    seconds: float = 0.0
    machine: dict[str, str] = field(default_factory=dict)
    checks: list[Outcome] = field(default_factory=list)

    def count(self, state: str) -> int:
        """How many checks ended in this state."""
        return sum(each.state == state for each in self.checks)


class _Worker:
    """A worker process on some of the checks, and its lines so far."""

    def __init__(self, device: str, folder: Path, names: Sequence[str]) -> None:
        self._results = folder / "results.jsonl"
        self._results.write_text("")
        self._log = (folder / "worker.log").open("w+", encoding="utf-8", errors="replace")
        self._read = 0
        variables = {
            HOME: str(folder / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "NUDGE_CODE_VERSION": "gpu-check",  # also where nudge runs without being installed
        }  # fmt: skip
        if device == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nudge.pipelines.gpu_check.worker", device, str(folder),
             str(self._results), *names],
            env=child_environment(MODEL_CHILD, variables), stdout=self._log, stderr=self._log,
            start_new_session=True,
        )  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        """The complete lines that were written since the last call."""
        with self._results.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._read += len(complete)
        return [json.loads(line) for line in complete.splitlines()]

    def status(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.poll()

    def log(self) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-LOG_LINES:])

    def end(self) -> None:
        """End it and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def run_checks(
    device: str,
    names: Sequence[str],
    tell: Callable[[str], None],
    limit_s: float = LIMIT_S,
) -> Report:
    """Run the checks of these names on ``device``, ``gpu`` or ``cpu``; ``tell`` gets a line for
    each. Raises `UserError` if torch cannot be imported or sees no GPU."""
    report = Report(device, datetime.now(UTC).isoformat(timespec="seconds"))
    began = time.monotonic()
    deadline = began + limit_s - RESERVE_S
    with tempfile.TemporaryDirectory(prefix="nudge-gpu-check-") as scratch:
        left = list(names)
        while left:
            if time.monotonic() > deadline:
                for name in left:
                    _add(report, Outcome(name, name, "skipped", _no_time(limit_s)), names, tell)
                break
            worker = _Worker(device, Path(scratch), left)
            try:
                _follow(worker, report, names, tell, deadline)
            finally:
                worker.end()
            ended = {each.name for each in report.checks}
            left = [name for name in left if name not in ended]
    report.seconds = round(time.monotonic() - began, 1)
    return report


def _no_time(limit_s: float) -> str:
    return f"the time limit of {limit_s / 60:g} minutes was reached; run it alone with --only"


def _add(
    report: Report, outcome: Outcome, names: Sequence[str], tell: Callable[[str], None]
) -> None:
    report.checks.append(outcome)
    message = f": {outcome.message}" if outcome.message else ""
    figures = ", ".join(f"{k} {v}" for k, v in outcome.figures.items() if isinstance(v, str | int))
    shown = f" ({figures})" if figures and outcome.state == "passed" else ""
    tell(
        f"[{len(report.checks)}/{len(names)}] {outcome.state:<7} {outcome.name} "
        f"{outcome.seconds:.1f} s{message[:300]}{shown}"
    )


def _follow(
    worker: _Worker,
    report: Report,
    names: Sequence[str],
    tell: Callable[[str], None],
    deadline: float,
) -> None:
    """Take a worker's outcomes until it ends, or until a check takes too long."""
    running: dict[str, Any] = {}
    since = time.monotonic()
    while True:
        status = worker.status()  # before the last lines are read
        for line in worker.lines():
            if line["event"] == "machine":
                if not report.machine and report.device == "gpu" and not line["gpu"]:
                    raise UserError(
                        f"torch {line['facts']['torch']} sees no GPU: `python -c 'import torch; "
                        f"torch.cuda.init()'` says why; `{COMMAND} --device cpu` runs what a CPU "
                        "can"
                    )
                report.machine = line["facts"]
            elif line["event"] == "start":
                running, since = line, time.monotonic()
            else:
                running = {}
                _add(report, _outcome(line), names, tell)
        now = time.monotonic()
        failed = ""
        if status is not None:
            if not running and status == 0:
                return
            if not report.machine:
                raise UserError(f"the checks cannot start (status {status}): {worker.log()}")
            failed = f"the process ended with status {status} during this check"
        elif running and now - since > running["limit_s"]:
            failed = f"no result after {running['limit_s']:.0f} s, so it was stopped"
        elif now > deadline:
            failed = "stopped, because the time for all checks was over"
        if failed:
            done = {each.name for each in report.checks}
            name = running.get("name") or next((each for each in names if each not in done), None)
            if name is None:  # it died after its last check, such as in CUDA's own cleanup
                return
            title = running.get("title", name)
            outcome = Outcome(name, title, "failed", failed, worker.log(), round(now - since, 1))
            _add(report, outcome, names, tell)
            return
        time.sleep(POLL_S)


def _outcome(line: dict[str, Any]) -> Outcome:
    fields = {each.name for each in dataclasses.fields(Outcome)}
    return Outcome(**{key: value for key, value in line.items() if key in fields})


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write the JSON file and the page into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(report)
    counts = {state: report.count(state) for state in ("passed", "failed", "skipped")}
    write_manifest(folder / RESULT, FORMAT, VERSION, {**counts, **values})
    write_atomic(folder / PAGE, render(values | counts))
    return folder / RESULT, folder / PAGE
