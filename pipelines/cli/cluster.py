"""The commands that speak to a pipelines server: upload, submit, schedule."""

import sys
from pathlib import Path

import click

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sanitize import visible

URL = click.option("--url", default="", help="The pipelines server; default: NUDGE_PIPELINES_URL.")


@click.command()
@click.argument("pipeline", default="train-and-serve")
@URL
def upload(pipeline: str, url: str) -> None:
    """Upload a pipeline, or a new version of it, to the pipelines server.

    PIPELINE is the name of one that ships with nudge or a compiled YAML file. A version is named by
    its content: uploading the same twice changes nothing.
    """
    from nudge.pipelines.cluster import connect, runs

    file = Path(pipeline) if pipeline.endswith((".yaml", ".yml")) else runs.shipped(pipeline)
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    made = runs.upload(connect.connect(url), file)
    click.echo(f"{made.version} {'uploaded' if made.fresh else 'is there already'}")


@click.command()
@click.argument("recipe", default="eiffel")
@click.option("--pipeline", default="train-and-serve", help="The pipeline's name on the server.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="As in `nudge run`.")
@click.option(
    "--parameter",
    "-p",
    "given",
    metavar="NAME=VALUE",
    multiple=True,
    help="A parameter of the pipeline, such as gpu_count=2; lists and mappings are YAML.",
)
@click.option("--name", default="", help="The run's name; default: the recipe's.")
@click.option("--no-follow", is_flag=True, help="Start the run and return.")
@URL
def submit(
    recipe: str,
    pipeline: str,
    overrides: tuple[str, ...],
    given: tuple[str, ...],
    name: str,
    no_follow: bool,
    url: str,
) -> None:
    """Start a run of the newest version on the pipelines server, and follow it.

    Exit status: 0 the run succeeded (or was started, with --no-follow), 1 it did not, 2 something
    given was wrong. Ctrl-C stops following; the run goes on.
    """
    from nudge.pipelines.cli import display
    from nudge.pipelines.cli.screen import Screen
    from nudge.pipelines.cluster import connect, runs
    from nudge.pipelines.recipes import load

    loaded = load(recipe, overrides)
    parameters = runs.sendable({"recipe": loaded.text, **_parameters(given)})
    server = connect.connect(url)
    run = runs.submit(server, pipeline, name or loaded.name, parameters)
    click.echo(visible(f"{run.run_id} {run.link}"))
    if no_follow:
        return
    try:
        with display.Live(Screen(stderr=True), run) as live:
            for current in runs.follow(server, run):
                live.show(current)
                live.lines(current.lines)
    except KeyboardInterrupt:
        click.echo(f"not followed any more; the run goes on: {run.link}", err=True)
        sys.exit(130)
    except UserError as error:
        raise UserError(f"{error}; not followed any more, the run goes on: {run.link}") from None
    if run.silent:
        click.echo(visible(f"no logs were shown: {run.silent}"), err=True)
    if run.reasonless:
        click.echo(visible(f"why a step waits was not shown: {run.reasonless}"), err=True)
    Screen().print(display.followed(run))
    Screen().print(display.came_to(run, run.link))
    click.echo(visible(run.state.lower()))
    if run.state != "SUCCEEDED":
        failed = run.failed
        reason = f"error: {failed.name}: {failed.error}" if failed else run.error
        click.echo(visible(reason), err=True)
        if failed and (pods := run.pods.get(failed.name)):
            click.echo(visible(f"its log: oc logs {pods[0]} -c main"), err=True)
        sys.exit(1)


def _parameters(given: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not name or not equals:
            raise UserError(f"--parameter {item}: expected name=value, such as gpu_count=2")
        values[name] = text
    return values


@click.group()
def schedule() -> None:
    """Runs by the clock of the pipelines server."""


@schedule.command("apply")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@URL
def schedule_apply(file: Path, url: str) -> None:
    """Bring the server's schedule to what FILE says; a run that is under way goes on."""
    from nudge.pipelines.cluster import connect, schedules

    wanted = schedules.read_schedule(file)
    done, _ = schedules.apply(connect.connect(url), wanted)
    click.echo(visible(f"{wanted.name} {done}"))
    if wanted.cron and not wanted.paused:
        click.echo(f"next: {_when(wanted.cron)}")


@schedule.command("list")
@URL
def schedule_list(url: str) -> None:
    """Show the schedules: when, which pipeline, and how overlaps and missed starts are treated."""
    from rich.table import Table

    from nudge.pipelines.cli.screen import Screen
    from nudge.pipelines.cluster import connect, schedules

    rows = schedules.find(connect.connect(url))
    if not rows:
        click.echo("there is no schedule; `nudge schedule apply FILE` makes one")
        return
    table = Table()
    for name in ("name", "state", "when", "next", "overlap", "missed starts", "version"):
        table.add_column(name, overflow="fold")
    for row in rows:
        trigger = row.trigger
        cron = trigger.cron_schedule.cron if trigger.cron_schedule else ""
        periodic = trigger.periodic_schedule
        every = f"every {int(periodic.interval_second) // 60} min" if periodic else ""
        reference = row.pipeline_version_reference
        fixed = reference.pipeline_version_id if reference else row.pipeline_version_id
        table.add_row(
            row.display_name,
            str(row.status).lower(),
            cron or every,
            _when(cron) if cron and row.status == "ENABLED" else "",
            "forbidden" if str(row.max_concurrency) == "1" else f"up to {row.max_concurrency}",
            "dropped" if row.no_catchup else "made up for",
            fixed or "latest",
        )
    Screen().print(table)


@schedule.command("pause")
@click.argument("name")
@URL
def schedule_pause(name: str, url: str) -> None:
    """Switch a schedule off; its runs go on, and `nudge schedule apply` switches it on again."""
    from nudge.pipelines.cluster import connect, schedules

    schedules.pause(connect.connect(url), name)
    click.echo(visible(f"{name} paused"))


@schedule.command("delete")
@click.argument("name")
@URL
def schedule_delete(name: str, url: str) -> None:
    """Delete a schedule; while one of its runs is under way it is only switched off."""
    from nudge.pipelines.cluster import connect, schedules

    schedules.delete(connect.connect(url), name)
    click.echo(visible(f"{name} deleted"))


def _when(cron: str) -> str:
    """The next start, in UTC (a server's clock unless CRON_SCHEDULE_TIMEZONE says otherwise) and
    by the clock here."""
    from nudge.pipelines.cluster.schedules import next_start

    found = next_start(cron)
    return f"{found:%Y-%m-%d %H:%M:%S} UTC ({found.astimezone():%H:%M %Z} here)"


@click.command()
def doctor() -> None:
    """Say what is missing here or on the cluster, and the command that mends it.

    Exit status: 0 nothing is missing, 1 something is.
    """
    from rich.table import Table
    from rich.text import Text

    from nudge.pipelines.cli.screen import Screen
    from nudge.pipelines.cluster.doctor import examine

    findings = examine()
    table = Table(show_header=False, box=None)
    marks = {"ok": "✓", "missing": "✗", "not used": "–"}
    for each in findings:
        told = f"{each.found}\n→ {each.mend}" if each.mend else each.found
        table.add_row(marks[each.state], each.check, Text(told, overflow="fold"))
    Screen().print(table)
    if any(each.state == "missing" for each in findings):
        sys.exit(1)
