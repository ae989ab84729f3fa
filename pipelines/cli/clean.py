"""`nudge clean`: free disk space by rules."""

import json
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from nudge.components.common.core.environment import nudge_home
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.screen import Screen


@click.command()
@click.option("--dry-run", is_flag=True, help="Show what would be freed and remove nothing.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout; asks nothing."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--days", type=float, help="Keep what was used within this many days (14).")
@click.option("--history-days", type=float, help="Keep results and pages this long (365).")
@click.option("--runs", type=int, help="Keep at least the newest runs (10).")
@click.option("--reuse", type=int, help="Keep the newest reusable results of each step (10).")
@click.option("--serving", type=int, help="Keep this many idle versions per model ready (1).")
@click.option("--checkpoints-days", type=float, help="Keep unfinished trainings this long (7).")
@click.option("--max-gigabytes", type=float, help="Remove old runs until this much is used.")
def clean(dry_run: bool, as_json: bool, yes: bool, **changes: Any) -> None:
    """Free disk space: old runs, reusable steps, idle versions, checkpoints and base models.

    \b
    nudge clean --dry-run                 what would go, and how much that frees
    nudge clean --runs 5 --days 7         keep less
    nudge clean --max-gigabytes 20        remove the oldest runs until 20 GB are used

    The artifacts of old runs go first; their results, pages and logs stay in `nudge runs`. Active
    runs, served versions, the object store and the registry are never touched, so a rollback works.
    `.nudge/retention.yaml` keeps rules of your own, with the same names (`days: 14`); scheduled
    runs apply them after each night.
    """
    from nudge.pipelines.local import retention

    home = nudge_home()
    options = {name: value for name, value in changes.items() if value is not None}
    wanted = retention.rules(home, options)
    plan = retention.plan(home, wanted)
    if not as_json:
        _show(plan)
    if not dry_run and plan.removals:
        if not yes and not as_json and not click.confirm("remove these?"):
            return
        plan = retention.apply(home, wanted)
        if not as_json:
            echo(f"freed {size(plan.frees)}")
    if as_json:
        echo(json.dumps(plan.plain() | {"dry_run": dry_run}, indent=2))


def _show(plan: Any) -> None:
    echo(f"{nudge_home()} uses {size(plan.used)}")
    if not plan.removals:
        echo("there is nothing to remove by the rules (`nudge clean --help` changes them)")
        return
    table = Table()
    table.add_column("kind", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("frees", justify="right", no_wrap=True)
    for each in plan.removals:
        name = str(each.path.relative_to(nudge_home()))
        table.add_row(each.kind, Text(name), Text(each.why), size(each.frees))
    Screen().print(table)
    echo(f"together: {size(plan.frees)}")


def size(count: float) -> str:
    """Bytes with three digits: ``2.1 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"
