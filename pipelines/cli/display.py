"""What a run looks like in a terminal: live progress, then tables."""

import json
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from nudge.components.common.core.figures import (
    MISSING,
    amounts,
    finite,
    per_gain,
    probability,
)
from nudge.components.common.core.nothing_new import nothing_new
from nudge.components.common.core.progress import RESULTS, SHOWN, figures
from nudge.components.common.core.say import say
from nudge.components.common.local.guard import header_file, is_here
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.step_state import StepState
from nudge.pipelines.steps import described

PLAIN = (str, int, float)
MARKS = {"waiting": " ", "running": "›", "done": "✓", "reused": "↺", "skipped": "–", "failed": "✗"}

MINUTE_S = 60.0
"""The time between two lines about a running step, where there is no terminal."""


class Followed(Protocol):
    """A run with steps to show; more steps may become known while it is followed."""

    steps: dict[str, StepState]


class Live:
    """Progress of each step: bars on a terminal, otherwise lines when a step begins and ends."""

    def __init__(self, console: Console, run: Followed) -> None:
        self._console, self._status = console, dict.fromkeys(run.steps, "waiting")
        self._notes: dict[str, tuple[int, str]] = {}
        self._last_line: dict[str, float] = {}
        self._began: dict[tuple[str, float], float] = {}
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
        """Draw the current state of the run."""
        if self._bars:
            self._add_bars(run)
        for name, step in run.steps.items():
            if step.status == "running":  # the first look is what the time left counts from
                self._passed(step)
                self._figures(step)
            if self._bars:
                task = self._tasks[name]
                if step.status == "running":
                    self._bars.start_task(task)
                ended = step.status not in ("waiting", "running")
                passed = step.seconds if ended else self._passed(step)
                self._bars.update(
                    task,
                    total=1.0 if ended else step.total,
                    completed=1.0 if ended else step.done,
                    # Rich's own clock stops once a step has done everything it counts.
                    clock="" if step.status in ("waiting", "skipped") else f"{passed:.0f} s",
                    mark=MARKS[step.status],
                    figures=step.status if ended else self._figures(step),
                )
                if ended:
                    self._bars.stop_task(task)
            else:
                self._print_change(name, step)
            self._status[name] = step.status

    def _print_change(self, name: str, step: StepState) -> None:
        """Print a line when a step begins, ends, is retried or waits, and one every minute."""
        now, current = time.monotonic(), (step.attempts, step.note)
        before = self._notes.get(name, (1, ""))
        if step.status not in ("waiting", self._status.get(name, "waiting")):
            took = f" {step.seconds:.1f} s" if step.seconds else ""
            self._line(f"{name}: {step.status}{took}{_tries(step)}")
            if step.note:
                self._line(f"{name}: {step.note}")
            self._last_line[name] = now
        elif step.status in ("waiting", "running"):
            if current != before and (step.note or step.attempts > before[0]):
                self._line(f"{name}: {step.note or 'running'}{_tries(step)}")
                self._last_line[name] = now
            elif step.status == "running" and now - self._last_line.get(name, now) >= MINUTE_S:
                passed = self._passed(step)
                self._line(f"{name}: running {passed:.0f} s  {self._figures(step)}".rstrip())
                self._last_line[name] = now
        self._notes[name] = current

    def _passed(self, step: StepState) -> float:
        """Seconds since an attempt of a step began; once it is seen, the clock may be set."""
        now = time.monotonic()
        begun = now - max(time.time() - step.started, 0.0)
        return now - self._began.setdefault((step.name, step.started), begun)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _figures(self, step: StepState) -> str:
        """Progress, figures, time left, attempt and reason for waiting of a running step."""
        now = time.monotonic()
        parts = []
        if step.unit:
            of = f"/{step.total:g}" if step.total else ""
            share = f" ({step.done / step.total:.0%})" if step.total else ""
            parts += [f"{step.done:g}{of} {step.unit}{share}", figures(step.fields).strip()]
            begun, done = self._first.setdefault(step.name, (now, step.done))
            if step.done < done:  # a new attempt starts from zero
                begun, done = self._first[step.name] = (now, step.done)
            if step.total and done < step.done < step.total:
                left = (step.total - step.done) * (now - begun) / (step.done - done)
                parts.append(f"about {left:.0f} s left")
        else:
            parts.append(figures(step.fields))
        if step.attempts > 1:
            parts.append(f"attempt {step.attempts}")
        parts.append(step.note)
        return "  ".join(filter(None, parts))

    def lines(self, lines: Iterable[tuple[str, str]]) -> None:
        """Print lines of the steps' logs above the bars, except the ones that a bar or the final
        table shows."""
        for name, line in lines:
            if self._bars is None or not (SHOWN.fullmatch(line.strip()) or RESULTS in line):
                self._console.print(f"{name} | {line}", markup=False, highlight=False)


def followed(run: Followed) -> Table:
    """The table of a run on a cluster: its steps and their results."""
    table = _step_table()
    for name, step in run.steps.items():
        plain = {key: each for key, each in step.results.items() if isinstance(each, PLAIN)}
        seconds = f"{step.seconds:.1f}" if step.seconds else ""
        status = f"{MARKS[step.status]} {step.status}{_tries(step)}"
        table.add_row(name, seconds, status, Text(figures(plain)))
    return table


def outcome(run: Followed, link: str) -> Table:
    """The outcome of a run on a cluster, from its steps' results; `nudge run` shows the same."""
    results = {name: step.results for name, step in run.steps.items()}
    deployed, registered = results.get("deploy", {}), results.get("register", {})
    ingested = results.get("ingest", {})
    no_text = nothing_new(ingested) if ingested.get("new") == 0 else ""
    version = f"{registered.get('registered_model')} {registered.get('version')}"
    rows = {
        "verdict": no_text or results.get("evaluate", {}).get("reason"),
        "model": results.get("upload", {}).get("uri"),
        "registered": version if registered else None,
        "not served": deployed.get("reason"),
        "endpoint": deployed.get("endpoint"),
        "report": f"{link} (evaluate, report)" if results.get("evaluate") else None,
    }
    return _rows(rows)


def _step_table(title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("status")
    table.add_column("result", overflow="fold")
    return table


def _tries(step: StepState) -> str:
    return f" ({step.attempts} attempts)" if step.attempts > 1 else ""


def summary(values: dict[str, Any], run: Followed) -> Group:
    """The tables of an ended run: steps, probes, perplexities, and where everything is."""
    parts: list[Any] = [_steps(values, run)]
    if values["probes"]:
        parts.append(_probes(values))
    if values["metrics"]:
        parts.append(_metrics(values))
    parts.append(_where(values))
    return Group(*parts)


def _steps(values: dict[str, Any], run: Followed) -> Table:
    table = _step_table(f"{values['recipe']}  {values['run_id']}")
    for name, step in run.steps.items():
        status = f"{MARKS[step.status]} {step.status}"
        table.add_row(name, f"{step.seconds:.1f}", status, Text(described(name, step.results)))
    return table


def _probes(values: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("prompt", overflow="fold")
    table.add_column("next token")
    table.add_column("P before", justify="right")
    table.add_column("P after", justify="right")
    table.add_column("should")
    for probe in values["probes"]:
        should = f"{probe['expect']}  {'✓' if probe['ok'] else '✗'}"
        before, after = (probability(probe[key]) for key in ("p_before", "p_after"))
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
        values_of_key = [of[key] for of in metrics.values()]
        if key != "word_perplexity" or any(map(finite, values_of_key)):
            table.add_row(key.replace("_", " "), *(_number(each) for each in values_of_key))
    return table


def ingested(values: dict[str, Any], examples: dict[str, list[str]]) -> Group:
    """What `nudge ingest` found: documents read, kept and held out, and dropped by reason."""
    documents, table = values["documents"], Table(title_justify="left")
    table.add_column("documents", justify="right")
    table.add_column("what")
    table.add_column("examples", overflow="fold")
    for name in ("read", "kept", "held_out"):
        table.add_row(str(documents[name]), name.replace("_", " "), "")
    dropped = sorted(values["dropped"].items(), key=lambda each: (-each[1], each[0]))
    for reason, count in dropped:
        table.add_row(str(count), f"dropped: {reason}", Text(" ".join(examples.get(reason, []))))
    table.add_row(str(values["bytes"]), "bytes of kept text", "")
    return Group(table, _rows({name: values[name] for name in ("corpus", "report")}))


def parts(rows: list[dict[str, Any]]) -> None:
    """Print the table of services. On a narrow terminal the names fold and the addresses do not
    (down to 64 columns); in a pipe or a file nothing folds."""
    table = Table()
    table.add_column("name", overflow="fold")
    for column in ("state", "address", "pid", "resident mb"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        keys = (str(column.header).replace(" ", "_") for column in table.columns)
        table.add_row(*(Text(str(row[key] or "")) for key in keys))
    console = Screen()
    if not console.is_terminal:
        console.width = 1000  # a table takes only what it needs
    console.print(table)


def _number(value: Any) -> str:
    """A figure of an evaluation, which is null where it is not a finite number."""
    return format(value, ".4g") if finite(value) else MISSING


def _where(values: dict[str, Any]) -> Table:
    rows = {"verdict": values["reason"], "model": values["model_uri"]}
    if values["metrics"] and not values["promoted"] and not values["version"]:
        rows["promoted"] = "no; what is served has not changed"
    if values["version"]:
        rows["registered"] = f"{values['registered_model']} {values['version']}"
    usage, cost = values.get("usage") or {}, values.get("cost") or {}
    used = amounts(usage.get("total") or {}, usage.get("currency") or "")
    rows["used"] = "; ".join(filter(None, (used, per_gain(cost))))
    return _rows(rows)


def ways_on(values: dict[str, Any], run: Followed, home: Path) -> list[str]:
    """The last lines of a run: its model folder, pages and endpoint, how to ask the model, and how
    to go back. Each can be copied."""
    model = f" --model {values['registered_model']}" if values["registered_model"] else ""
    found: dict[str, str | None] = {
        "model folder": values["model_path"],
        "page": values.get("page"),
        "report": values["report"],
        "endpoint": values["endpoint"],
    }
    if values["endpoint"]:
        prompt = str(run.steps["deploy"].results.get("smoke_prompt") or "Hello")
        found["ask it"] = f"nudge ask{model} {shlex.quote(prompt)}"
        found["or"] = curl(values, prompt, home)
        if "incumbent" in values["metrics"]:  # after the first version there is no way back
            found["go back"] = f"nudge rollback{model}"
    elif values.get("awaiting_approval"):
        found["serve it"] = f"nudge approve {values['version']}{model}"
    elif values["version"]:
        found["serve it"] = f"nudge promote {values['version']}{model}"
    elif values["model_path"]:
        found["ask it"] = f"nudge chat {values['run_id']}"
    return ["", *(f"{name:12} {value}" for name, value in found.items() if value)]


def _rows(rows: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(str(value), overflow="fold"))
    return table


def stage(model: str, now: str) -> None:
    """Print the current stage on stderr while a model's traffic moves."""
    say(f"{model}: {now}")


def curl(values: dict[str, Any], prompt: str, home: Path) -> str:
    """A command that asks the endpoint to complete a prompt; ``home`` has the endpoint's token."""
    from nudge.components.deploy.local.gateway import TOKEN

    body = {"model": values["served_model"], "prompt": prompt, "max_tokens": 8}
    header = "-H 'Content-Type: application/json'"
    if is_here(values["endpoint"]):
        # In a file, because every user can read curl's arguments in the process list.
        header += f" -H {shlex.quote(f'@{header_file(home, TOKEN)}')}"
    quoted = shlex.quote(json.dumps(body))
    url = shlex.quote(f"{values['endpoint']}/v1/completions")
    return f"curl -s {url} {header} -d {quoted}"
