"""`nudge runs` and `nudge logs`: what the runs of this machine did."""

import json
import sys
import webbrowser
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem
from rich.table import Table
from rich.text import Text

from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.errors import UserError, nearest
from nudge.components.common.core.sanitize import visible
from nudge.pipelines.cli.clean import size
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.steps import PIPELINE, described

if TYPE_CHECKING:
    from nudge.pipelines.local.history import PastRun

SPARKS = "▁▂▃▄▅▆▇█"
CURVE_POINTS = 20
COLORS = {"promoted": "green", "failed": "red", "interrupted": "red", "unreadable": "red"}


def _complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    folders = sorted((nudge_home() / "runs").glob("[0-9]*"), reverse=True)
    names = ["last", *(path.name for path in folders)]
    return [CompletionItem(name) for name in names if name.startswith(begun)]


RUN = click.argument("run", default="last", shell_complete=_complete)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.group(invoke_without_command=True)
@click.option("--recipe", default="", help="Only runs of this recipe.")
@click.option("--model", default="", help="Only runs of this registered model.")
@click.option("--state", default="", help="Only runs in this state, such as promoted or failed.")
@click.option("--limit", default=20, show_default=True, help="At most this many, newest first.")
@JSON
@click.pass_context
def runs(
    ctx: click.Context, recipe: str, model: str, state: str, limit: int, as_json: bool
) -> None:
    """List the runs of this machine, and show, compare, open or delete them.

    \b
    nudge runs                          newest first
    nudge runs --state failed           only those that failed
    nudge runs show                     the last one; or `nudge runs show ffc6`
    nudge runs compare ffc6 ab12        settings that differ, curves and verdicts side by side
    nudge runs open                     the last run's page in a browser

    A run is named by its id, by the first or last characters of it, or by `last`.
    """
    if ctx.invoked_subcommand is not None:
        return
    from nudge.pipelines.local import history

    if state and state not in history.STATES:
        raise UserError(f"there is no state {state!r}; {nearest(state, history.STATES)}")
    found = [
        run
        for run in history.runs(nudge_home())
        if (not recipe or run.recipe == recipe)
        and (not model or run.model == model)
        and (not state or run.state == state)
    ]
    if as_json:
        echo(json.dumps([run.row() for run in found[:limit]], indent=2))
        return
    if not found:
        which = "no runs match" if recipe or model or state else "no runs"
        echo(f"{which} in {nudge_home()}; `nudge run` starts one", err=True)
        return
    Screen().print(_list(found[:limit]))
    if len(found) > limit:
        echo(f"{len(found) - limit} older ones are not shown; --limit {len(found)} shows all")


def _list(found: "list[PastRun]") -> Table:
    from nudge.pipelines.local.run_page import duration

    table = Table(show_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("recipe", overflow="fold")
    table.add_column("state", no_wrap=True)
    for column in ("took", "bits/byte", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in found:
        table.add_row(
            run.run_id,
            Text(run.recipe),
            Text(run.state.replace("awaiting ", "awaiting\n"), COLORS.get(run.state, "")),
            "" if run.seconds is None else duration(run.seconds),
            "" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}",
            "" if run.difference is None else f"{run.difference:+.4f}",
        )
    return table


@runs.command("show")
@RUN
@JSON
def show(run: str, as_json: bool) -> None:
    """Show one run: verdict, steps, files, and what to do next."""
    from nudge.pipelines.local import history, run_page

    found = history.find(nudge_home(), run)
    page = run_page.write_page(found)
    if as_json:
        echo(json.dumps(found.row() | {"result": found.result or None}, indent=2))
        return
    facts: dict[str, Any] = {
        "run": found.run_id,
        "recipe": found.recipe,
        "state": found.state,
        "why": found.reason,
        "started": found.started and f"{found.started:%Y-%m-%d %H:%M}",
        "took": "" if found.seconds is None else run_page.duration(found.seconds),
        "bits per byte": "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}",
        "model folder": found.output("train", "model"),
        "model": found.result.get("model_uri"),
        "registered": found.version and f"{found.model} {found.version}",
        "endpoint": found.result.get("endpoint"),
        "page": page,
        **run_page.next_commands(found),
    }
    for name, value in facts.items():  # never folded, so that a path can be copied
        if value:
            echo(f"{name:13} {value}")
    steps = Table()
    for column in ("step", "status", "seconds", "result"):
        steps.add_column(column, overflow="fold")
    for step in found.steps.values():
        seconds = f"{step.seconds:.1f}" if step.seconds else ""
        result = step.error or described(step.name, step.results)
        steps.add_row(step.name, run_page.status_of(found, step), seconds, Text(result))
    Screen().print(steps)


@runs.command("compare")
@click.argument("names", nargs=-1, required=True, metavar="RUN RUN...", shell_complete=_complete)
@JSON
def compare(names: tuple[str, ...], as_json: bool) -> None:
    """Compare runs: the settings that differ, the training curves, and the verdicts."""
    from nudge.pipelines.local import history

    if len(names) < 2:
        raise UserError("name two or more runs, such as `nudge runs compare ffc6 last`")
    found = [history.find(nudge_home(), name) for name in names]
    values = comparison(found)
    if as_json:
        echo(json.dumps(values, indent=2))
        return
    table = Table()
    table.add_column("")
    for run in found:
        table.add_column(run.run_id, overflow="fold")
    for section in ("outcome", "settings"):
        for key, cells in values[section].items():
            table.add_row(key, *(Text(_cell(cell)) for cell in cells))
        table.add_section()
    if not values["settings"]:
        table.add_row("settings", *(["the same"] * len(found)))
    curves = [[loss for _, loss in points] for points in values["curves"]]
    low, high = _ends(curves)
    table.add_row("training loss", *(Text(spark(each, low, high)) for each in curves))
    for name, at in (("first loss", 0), ("last loss", -1)):
        table.add_row(name, *(f"{each[at]:.4f}" if each else "" for each in curves))
    Screen().print(table)


def comparison(found: "list[PastRun]") -> dict[str, Any]:
    """What differs between runs, each value a list with one entry per run; ``curves`` are the
    training losses as [step, loss]."""
    from nudge.pipelines.local import history

    outcome = {
        key: [run.row()[key] for run in found]
        for key in ("recipe", "state", "version", "seconds", "bits_per_byte", "difference")
    }
    for key in ("core_hours", "gpu_hours", "cost"):
        if any(values := [run.row()[key] for run in found]):
            outcome[key] = values
    for name in ("base", "incumbent"):
        metrics = [(run.result.get("metrics") or {}).get(name) or {} for run in found]
        outcome[f"{name}_bits_per_byte"] = [each.get("bits_per_byte") for each in metrics]
    outcome["probes_passed"] = [
        _passed(run.result["probes"]) if run.result.get("probes") else None for run in found
    ]
    outcome["verdict"] = [run.reason for run in found]
    every = [history.settings(run) for run in found]
    keys = dict.fromkeys(key for values in every for key in values)
    return {
        "runs": [run.run_id for run in found],
        "outcome": outcome,
        "settings": {
            key: [values.get(key) for values in every]
            for key in keys
            if len({json.dumps(values.get(key), default=str) for values in every}) > 1
        },
        "curves": [history.curve(run) for run in found],
    }


def _passed(probes: list[dict[str, Any]]) -> str:
    return f"{sum(bool(probe.get('ok')) for probe in probes)} of {len(probes)}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) and abs(value) >= 1e-3 else str(value)


def _ends(curves: list[list[float]]) -> tuple[float, float]:
    every = [loss for curve in curves for loss in curve]
    return (min(every), max(every)) if every else (0.0, 1.0)


def spark(values: list[float], low: float, high: float) -> str:
    """A curve in one line of characters, thinned evenly, on a scale from ``low`` to ``high``."""
    if not values:
        return ""
    count = min(CURVE_POINTS, len(values))
    thinned = [values[at * (len(values) - 1) // max(count - 1, 1)] for at in range(count)]
    top = len(SPARKS) - 1
    return "".join(SPARKS[round(top * (v - low) / ((high - low) or 1))] for v in thinned)


@runs.command("open")
@RUN
def open_page(run: str) -> None:
    """Open a run's page in a browser, and print its path."""
    from nudge.pipelines.local import history, run_page

    page = run_page.write_page(history.find(nudge_home(), run))
    echo(page)
    if sys.stdout.isatty():
        webbrowser.open(page.as_uri())


@runs.command("delete")
@click.argument("names", nargs=-1, required=True, metavar="RUN...", shell_complete=_complete)
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(names: tuple[str, ...], yes: bool) -> None:
    """Delete runs: their folders with model, reports and log.

    What a run uploaded, registered or serves stays. `nudge clean` deletes old runs by rules.
    """
    from nudge.pipelines.local import history

    home = nudge_home()
    found = [history.find(home, name) for name in names]
    for run in found:
        question = f"delete the run {run.run_id} ({run.recipe or 'no recipe'}, {run.state})?"
        if not yes and not click.confirm(visible(question)):
            continue
        echo(f"deleted {run.run_id}, {size(history.delete(home, run))}")


@click.command()
@RUN
@click.argument("step", required=False, type=click.Choice(PIPELINE))
@click.option("--raw", is_flag=True, help="Print the engine's lines too.")
def logs(run: str, step: str | None, raw: bool) -> None:
    """Print the log of a run, or of one of its steps.

    \b
    nudge logs                 the last run
    nudge logs train           one step of it
    nudge logs ffc6 train      one step of one run

    A step that failed is named by `nudge runs show`. Runs on a cluster keep their logs there.
    """
    from nudge.pipelines.local import history
    from nudge.pipelines.local.log_lines import step_lines

    if step is None and run in PIPELINE:
        run, step = "last", run
    found = history.find(nudge_home(), run)
    if not found.log.is_file():
        raise UserError(f"{found.run_id} has no log (its file {found.log} is missing)")
    with found.log.open(encoding="utf-8", errors="replace") as file:
        lines = (click.unstyle(line.rstrip("\n")) for line in file)
        for line in step_lines(lines, step, raw):
            echo(line)
