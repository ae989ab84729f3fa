"""What a person sees of a run in a terminal: live progress, then a table."""

import json
import shlex
import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

from nudge.components.common.progress import RESULTS, SHOWN, figures
from nudge.pipelines.local.run import Run, StepState
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

PLAIN = (str, int, float)
MARKS = {"waiting": " ", "running": "›", "done": "✓", "reused": "↺", "skipped": "–", "failed": "✗"}


class Followed(Protocol):
    """What has steps to be shown; more of them may come to be known while it goes on."""

    steps: dict[str, StepState]


class Live:
    """Progress of each step: bars on a terminal, else a line when a step begins and ends."""

    def __init__(self, console: Console, run: Followed) -> None:
        self._console, self._said = console, dict.fromkeys(run.steps, "waiting")
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
                    figures=step.status if ended else figures(step.fields),
                )
                if ended:
                    self._bars.stop_task(task)
            elif step.status not in ("waiting", self._said.get(name, "waiting")):
                took = f" {step.seconds:.1f} s" if step.seconds else ""
                self._console.print(f"{name}: {step.status}{took}", markup=False, highlight=False)
            self._said[name] = step.status

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
        status = f"{MARKS[step.status]} {step.status}"
        table.add_row(name, seconds, status, Text(figures(plain)))
    return table


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
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # of which a table takes what it needs
    console.print(table)


def _number(value: float | None, form: str) -> str:
    """An evaluation holds null where a figure is no finite number."""
    return "not available" if value is None else format(value, form)


def _places(values: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    rows = {"verdict": values["reason"], "report": values["report"], "model": values["model_uri"]}
    if values["version"]:
        rows["registered"] = f"{values['registered_model']} {values['version']}"
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(str(value), overflow="fold"))
    return table


def stage(model: str, now: str) -> None:
    """Say on stderr what goes on while a model's traffic is moved, for who waits for it."""
    print(f"{model}: {now}", file=sys.stderr, flush=True)


def curl(values: dict[str, Any], prompt: str) -> str:
    """A command that asks the endpoint how a prompt goes on."""
    body = {"model": values["served_model"], "prompt": prompt, "max_tokens": 8}
    header = "-H 'Content-Type: application/json'"
    quoted = shlex.quote(json.dumps(body))
    return f"curl -s {values['endpoint']}/v1/completions {header} -d {quoted}"
