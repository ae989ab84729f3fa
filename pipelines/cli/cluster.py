"""The commands that use a pipelines server: upload, submit, schedule."""

import sys
from pathlib import Path

import click
from rich.table import Table

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sanitize import visible
from nudge.pipelines.cli import display
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.recipes import load

URL = click.option("--url", default="", help="The pipelines server; default: NUDGE_PIPELINES_URL.")


@click.command()
@click.argument("pipeline", default="train-and-serve")
@URL
def upload(pipeline: str, url: str) -> None:
    """Upload a pipeline, or a new version of it, to the pipelines server.

    PIPELINE is the name of a pipeline that ships with nudge or a compiled YAML file; the default is
    train-and-serve. A version is named after its content, so uploading the same file twice changes
    nothing.
    """
    from nudge.pipelines.cluster import connect, runs

    file = Path(pipeline) if pipeline.endswith((".yaml", ".yml")) else runs.shipped(pipeline)
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    uploaded = runs.upload(connect.connect(url), file)
    state = "uploaded" if uploaded.fresh else "exists already"
    click.echo(visible(f"{uploaded.version} {state}"))


@click.command()
@click.argument("recipe", default="eiffel")
@click.option("--pipeline", default="train-and-serve", help="The pipeline's name on the server.")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a setting of the recipe, as in `nudge run`.",
)
@click.option(
    "--parameter",
    "-p",
    "parameters",
    metavar="NAME=VALUE",
    multiple=True,
    help="A parameter of the pipeline, such as gpu_count=2; write lists and mappings as YAML.",
)
@click.option("--name", default="", help="The run's name; default: the recipe's.")
@click.option("--no-follow", is_flag=True, help="Start the run and return.")
@URL
def submit(
    recipe: str,
    pipeline: str,
    overrides: tuple[str, ...],
    parameters: tuple[str, ...],
    name: str,
    no_follow: bool,
    url: str,
) -> None:
    """Start a run of the newest version on the pipelines server, and follow it.

    RECIPE is the name of a recipe or a YAML file, as in `nudge run`; its text travels with the run.

    \b
    nudge upload                                  once, and after each change of nudge
    nudge submit mine.yaml -p gpu_count=2

    Exit status: 0 the run succeeded (or was started, with --no-follow), 1 it did not succeed,
    2 the input was refused. Ctrl-C stops following; the run continues.
    """
    from nudge.components.common.preflight.elsewhere import check_elsewhere
    from nudge.pipelines.cluster import connect, runs

    loaded = load(recipe, overrides)
    check_elsewhere(loaded.text)
    values = runs.sendable({"recipe": loaded.text, **_parameters(parameters)})
    server = connect.connect(url)
    run = runs.submit(server, pipeline, name or loaded.name, values)
    click.echo(visible(f"{run.run_id} {run.link}"))
    if no_follow:
        return
    try:
        with display.Live(Screen(stderr=True), run) as live:
            for current in runs.follow(server, run):
                live.show(current)
                live.lines(current.lines)
    except KeyboardInterrupt:
        click.echo(visible(f"stopped following; the run continues: {run.link}"), err=True)
        sys.exit(130)
    except UserError as error:
        raise UserError(f"{error}; stopped following, the run continues: {run.link}") from None
    if run.silent:
        click.echo(visible(f"no logs are available: {run.silent}"), err=True)
    if run.reasonless:
        click.echo(
            visible(f"the reasons why steps wait are not available: {run.reasonless}"), err=True
        )
    Screen().print(display.followed(run))
    Screen().print(display.outcome(run, run.link))
    click.echo(visible(run.state.lower()))
    if run.state != "SUCCEEDED":
        failed = run.failed
        reason = f"error: {failed.name}: {failed.error}" if failed else run.error
        click.echo(visible(reason), err=True)
        if failed and (pods := run.pods.get(failed.name)):
            click.echo(visible(f"its log: oc logs {pods[0]} -c main"), err=True)
        sys.exit(1)


def _parameters(items: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not name or not equals:
            raise UserError(f"--parameter {item}: expected name=value, such as gpu_count=2")
        values[name] = text
    return values


@click.group()
def schedule() -> None:
    """Run a pipeline regularly, by the clock of the pipelines server.

    A schedule is a YAML file with a name, a recipe and `cron` or `interval_minutes`;
    `nudge schedule apply FILE` creates or changes it on the server.
    """


@schedule.command("apply")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@URL
def schedule_apply(file: Path, url: str) -> None:
    """Create or change the schedule in FILE on the server; an active run continues."""
    from nudge.pipelines.cluster import connect, schedules

    wanted = schedules.read_schedule(file)
    done, _ = schedules.apply(connect.connect(url), wanted)
    click.echo(visible(f"{wanted.name} {done}"))
    if wanted.cron and not wanted.paused:
        click.echo(f"next: {_when(wanted.cron)}")


@schedule.command("list")
@URL
def schedule_list(url: str) -> None:
    """List the schedules: when they run, which version, and how overlaps are handled."""
    from nudge.pipelines.cluster import connect, schedules

    rows = schedules.find(connect.connect(url))
    if not rows:
        click.echo("there is no schedule; create one with `nudge schedule apply FILE`")
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
            "dropped" if row.no_catchup else "caught up",
            fixed or "latest",
        )
    Screen().print(table)


@schedule.command("pause")
@click.argument("name")
@URL
def schedule_pause(name: str, url: str) -> None:
    """Disable a schedule; its runs continue, and `nudge schedule apply` enables it."""
    from nudge.pipelines.cluster import connect, schedules

    schedules.pause(connect.connect(url), name)
    click.echo(visible(f"{name} paused"))


@schedule.command("delete")
@click.argument("name")
@URL
def schedule_delete(name: str, url: str) -> None:
    """Delete a schedule; while one of its runs is active it is only disabled."""
    from nudge.pipelines.cluster import connect, schedules

    schedules.delete(connect.connect(url), name)
    click.echo(visible(f"{name} deleted"))


def _when(cron: str) -> str:
    """The next start in UTC (the server's clock unless CRON_SCHEDULE_TIMEZONE changes it) and in
    local time."""
    from nudge.pipelines.cluster.schedules import next_start

    found = next_start(cron)
    return f"{found:%Y-%m-%d %H:%M:%S} UTC ({found.astimezone():%H:%M %Z} local time)"
