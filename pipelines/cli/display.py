"""What a person sees of a run in a terminal: live progress, then a table."""

import json
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from nudge.components.common.core.guard import header_file
from nudge.components.common.core.progress import RESULTS, SHOWN, figures
from nudge.components.common.core.sanitize import visible
from nudge.components.deploy.local.gateway import TOKEN
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.local.run import NOTHING_NEW, Run, StepState

PLAIN = (str, int, float)
MARKS = {"waiting": " ", "running": "›", "done": "✓", "reused": "↺", "skipped": "–", "failed": "✗"}


MINUTE_S = 60.0
"""Between two lines about a step that runs, where there is no terminal."""


class Followed(Protocol):
    """What has steps to be shown; more of them may come to be known while it goes on."""

    steps: dict[str, StepState]


class Live:
    """Progress of each step: bars on a terminal, else a line when a step begins and ends."""

    def __init__(self, console: Console, run: Followed) -> None:
        self._console, self._said = console, dict.fromkeys(run.steps, "waiting")
        self._told: dict[str, tuple[int, str]] = {}
        self._spoke: dict[str, float] = {}
        self._first: dict[str, tuple[float, float]] = {}
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.fields[mark]} {task.description:10}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[clock]:>5}"),
                TextColumn("{task.fields[figures]}", markup=False),
                console=console,
            )
            self._add_bars(run)

    def _add_bars(self, run: Followed) -> None:
        assert self._bars is not None
        for name in [name for name in run.steps if name not in self._tasks]:
            self._tasks[name] = self._bars.add_task(
                name, total=None, start=False, mark=" ", figures="", clock=""
            )

    def __enter__(self) -> "Live":
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def show(self, run: Followed) -> None:
        """Draw the run as it stands now."""
        if self._bars:
            self._add_bars(run)
        for name, step in run.steps.items():
            if self._bars:
                task = self._tasks[name]
                if step.status == "running":
                    self._bars.start_task(task)
                ended = step.status not in ("waiting", "running")
                passed = step.seconds if ended else time.time() - step.started
                self._bars.update(
                    task,
                    total=1.0 if ended else step.total,
                    completed=1.0 if ended else step.done,
                    # Rich's own clock stops as soon as a step has done all that it counts.
                    clock="" if step.status in ("waiting", "skipped") else f"{passed:.0f} s",
                    mark=MARKS[step.status],
                    figures=step.status if ended else self._figures(step),
                )
                if ended:
                    self._bars.stop_task(task)
            else:
                self._speak(name, step)
            self._said[name] = step.status

    def _speak(self, name: str, step: StepState) -> None:
        """A line where a step begins, ends, is tried again or waits; one a minute in between."""
        now, told = time.monotonic(), (step.attempts, step.note)
        before = self._told.get(name, (1, ""))
        if step.status not in ("waiting", self._said.get(name, "waiting")):
            took = f" {step.seconds:.1f} s" if step.seconds else ""
            self._line(f"{name}: {step.status}{took}{_tries(step)}")
            if step.note:
                self._line(f"{name}: waits: {step.note}")
            self._spoke[name] = now
        elif step.status in ("waiting", "running"):
            if told != before and (step.note or step.attempts > before[0]):
                waits = f"waits: {step.note}" if step.note else "running"
                self._line(f"{name}: {waits}{_tries(step)}")
                self._spoke[name] = now
            elif step.status == "running" and now - self._spoke.get(name, now) >= MINUTE_S:
                passed = max(time.time() - step.started, 0)
                self._line(f"{name}: running {passed:.0f} s  {self._figures(step)}".rstrip())
                self._spoke[name] = now
        self._told[name] = told

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _figures(self, step: StepState) -> str:
        """Progress, figures, time left, attempt and reason for waiting of a step that runs."""
        now = time.monotonic()
        parts = []
        if step.unit:
            of = f"/{step.total:g}" if step.total else ""
            parts += [f"{step.done:g}{of} {step.unit}", figures(step.fields).strip()]
            begun, done = self._first.setdefault(step.name, (now, step.done))
            if step.done < done:  # a new attempt counts anew
                begun, done = self._first[step.name] = (now, step.done)
            if step.total and done < step.done < step.total:
                left = (step.total - step.done) * (now - begun) / (step.done - done)
                parts.append(f"about {left:.0f} s left")
        else:
            parts.append(figures(step.fields))
        if step.attempts > 1:
            parts.append(f"attempt {step.attempts}")
        if step.note:
            parts.append(f"waits: {step.note}")
        return "  ".join(filter(None, parts))

    def lines(self, lines: Iterable[tuple[str, str]]) -> None:
        """Write lines of the steps' logs above the bars, but for those that a bar or the table at
        the end shows."""
        for name, line in lines:
            if self._bars is None or not (SHOWN.fullmatch(line.strip()) or RESULTS in line):
                self._console.print(f"{name} | {line}", markup=False, highlight=False)


def followed(run: Followed) -> Table:
    """The table of a run on a cluster: its steps and what came out of each."""
    table = Table()
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("status")
    table.add_column("what came out", overflow="fold")
    for name, step in run.steps.items():
        plain = {key: each for key, each in step.results.items() if isinstance(each, PLAIN)}
        seconds = f"{step.seconds:.1f}" if step.seconds else ""
        status = f"{MARKS[step.status]} {step.status}{_tries(step)}"
        table.add_row(name, seconds, status, Text(figures(plain)))
    return table


def came_to(run: Followed, link: str) -> Table:
    """What a run on a cluster came to, from its steps' results: `nudge run` shows the same."""
    results = {name: step.results for name, step in run.steps.items()}
    deployed, registered = results.get("deploy", {}), results.get("register", {})
    nothing_new = results.get("ingest", {}).get("new") == 0
    version = f"{registered.get('registered_model')} {registered.get('version')}"
    rows = {
        "verdict": NOTHING_NEW if nothing_new else results.get("evaluate", {}).get("reason"),
        "model": results.get("upload", {}).get("uri"),
        "registered": version if registered else None,
        "endpoint": deployed.get("endpoint"),
        "report": f"{link} (evaluate, report)" if results.get("evaluate") else None,
    }
    return _rows(rows)


def _tries(step: StepState) -> str:
    return f" ({step.attempts} attempts)" if step.attempts > 1 else ""


def summary(values: dict[str, Any], run: Run) -> Group:
    """The tables of an ended run: steps, probes, perplexities, and where everything is."""
    parts: list[Any] = [_steps(values, run)]
    if values["probes"]:
        parts.append(_probes(values))
    if values["metrics"]:
        parts.append(_metrics(values))
    parts.append(_places(values))
    return Group(*parts)


def _steps(values: dict[str, Any], run: Run) -> Table:
    table = Table(title=f"{values['recipe']}  {values['run_id']}", title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("status")
    table.add_column("what came out", overflow="fold")
    for name, step in run.steps.items():
        status = f"{MARKS[step.status]} {step.status}"
        table.add_row(name, f"{step.seconds:.1f}", status, Text(_outcome(name, step.results)))
    return table


def _outcome(name: str, results: dict[str, Any]) -> str:
    if not results:
        return ""
    if name == "deploy" and not results.get("promoted", True):
        return "registered, not promoted"
    return {
        # Runs of earlier versions have no account.
        "ingest": "{account}"
        if "account" in results
        else "{train_documents} + {validation_documents} documents, {bytes} bytes",
        "tokenize": "{train_tokens} + {validation_tokens} tokens",
        "train": "{steps} steps, {tokens} tokens, last loss {loss:.3f}",
        "evaluate": "{base_bits_per_byte:.4f} -> {candidate_bits_per_byte:.4f} bits per byte",
        "upload": "{files} files, {bytes} bytes",
        "register": "{registered_model} {version}",
        "deploy": "{smoke_prompt} ->{smoke_answer!r}",
        "summary": "{state}",
    }[name].format(**results)


def _probes(values: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("prompt", overflow="fold")
    table.add_column("next token")
    table.add_column("P before", justify="right")
    table.add_column("P after", justify="right")
    table.add_column("should")
    for probe in values["probes"]:
        should = f"{probe['expect']}  {'✓' if probe['ok'] else '✗'}"
        before, after = (_number(probe[key], ".3f") for key in ("p_before", "p_after"))
        table.add_row(Text(probe["prompt"]), Text(repr(probe["target"])), before, after, should)
    return table


def _metrics(values: dict[str, Any]) -> Table:
    columns = {"base": "base", "incumbent": "served now", "candidate": "candidate"}
    metrics = {name: values["metrics"][name] for name in columns if name in values["metrics"]}
    table = Table()
    table.add_column(f"held-out text, {metrics['base']['documents']} documents")
    for name in metrics:
        table.add_column(columns[name], justify="right")
    for key in ("bits_per_byte", "token_perplexity", "word_perplexity"):
        table.add_row(key.replace("_", " "), *(_number(of[key], ".4g") for of in metrics.values()))
    return table


def parts(rows: list[dict[str, Any]]) -> None:
    """Print the table of what runs here; on a narrow terminal the names fold and the addresses do
    not (down to 64 columns), in a pipe or a file nothing does."""
    table = Table()
    table.add_column("name", overflow="fold")
    for column in ("state", "address", "pid", "resident mb"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        keys = (str(column.header).replace(" ", "_") for column in table.columns)
        table.add_row(*(Text(str(row[key] or "")) for key in keys))
    console = Screen()
    if not console.is_terminal:
        console.width = 1000  # of which a table takes what it needs
    console.print(table)


def _number(value: float | None, form: str) -> str:
    """An evaluation holds null where a figure is no finite number."""
    return "not available" if value is None else format(value, form)


def _places(values: dict[str, Any]) -> Table:
    rows = {"verdict": values["reason"], "report": values["report"], "model": values["model_uri"]}
    if values["version"]:
        rows["registered"] = f"{values['registered_model']} {values['version']}"
    return _rows(rows)


def _rows(rows: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(str(value), overflow="fold"))
    return table


def stage(model: str, now: str) -> None:
    """Say on stderr what goes on while a model's traffic is moved, for who waits for it."""
    print(visible(f"{model}: {now}"), file=sys.stderr, flush=True)


def curl(values: dict[str, Any], prompt: str, home: Path) -> str:
    """A command that asks the endpoint how a prompt goes on; ``home`` has the endpoint's token."""
    body = {"model": values["served_model"], "prompt": prompt, "max_tokens": 8}
    header = "-H 'Content-Type: application/json'"
    if values["endpoint"].startswith("http://127.0.0.1:"):
        # By a file: curl's arguments are in the list of processes, which every user can read.
        header += f" -H {shlex.quote(f'@{header_file(home, TOKEN)}')}"
    quoted = shlex.quote(json.dumps(body))
    return f"curl -s {values['endpoint']}/v1/completions {header} -d {quoted}"
