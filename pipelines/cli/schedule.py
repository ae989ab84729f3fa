"""`nudge schedule`: run a recipe regularly, on a pipelines server or on this machine."""

import datetime
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from nudge.components.common.core.environment import PIPELINES_URL, in_pod, nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import write_atomic
from nudge.pipelines.cli.cluster import URL
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.recipes import load

if TYPE_CHECKING:
    from nudge.pipelines.cluster.schedules import Schedule

HERE = click.option(
    "--here",
    is_flag=True,
    help="On this machine, by systemd or cron; the default where no pipelines server is known.",
)


@click.group()
def schedule() -> None:
    """Run a recipe regularly, on a pipelines server or on this machine.

    A schedule is a YAML file with a name, a recipe and `cron` (six fields, seconds first) or
    `interval_minutes`; `nudge schedule apply FILE` creates or changes it. Where no pipelines server
    is known (and with --here), it becomes a systemd timer of your user or a line of your crontab.

    \b
    name: nightly
    recipe: mine.yaml
    cron: "0 30 2 * * *"      every night at half past two
    """


def _local(url: str, here: bool) -> bool:
    """Whether a schedule is one of this machine."""
    if here and url:
        raise UserError("--here and --url exclude each other")
    known = url or os.environ.get(PIPELINES_URL) or in_pod() or shutil.which("oc")
    return here or not known


@schedule.command("apply")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@URL
@HERE
@click.option("--yes", is_flag=True, help="Do not ask before this machine is changed.")
def schedule_apply(file: Path, url: str, here: bool, yes: bool) -> None:
    """Create or change the schedule in FILE; an active run continues.

    On this machine it shows what it installs and asks first.
    """
    from nudge.pipelines.cluster import connect, schedules

    wanted = schedules.read_schedule(file)
    if _local(url, here):
        _apply_here(wanted, yes)
        return
    done, _ = schedules.apply(connect.connect(url), wanted)
    echo(f"{wanted.name} {done}")
    if wanted.cron and not wanted.paused:
        echo(f"next: {_when(wanted.cron)}")


def _apply_here(wanted: "Schedule", yes: bool) -> None:
    from nudge.pipelines.local import schedules as local

    home = nudge_home()
    text = str(wanted.parameters.get("recipe") or "")
    if not text:
        raise UserError(f"{wanted.name}: recipe is required for a schedule on this machine")
    ignored = sorted(set(wanted.parameters) - {"recipe"})
    made = local.LocalSchedule(
        name=wanted.name,
        recipe=str(home / local.FOLDER / f"{wanted.name}.yaml"),
        folder=str(Path.cwd()),
        kind=local.kind_here(),
        cron=wanted.cron,
        interval_minutes=wanted.interval_minutes,
        catch_up=wanted.catch_up,
        paused=wanted.paused,
    )
    if made.kind == "systemd":
        shown = local.units(home, made)
        local.check_units(shown)
        for name, unit in shown.items():
            echo(f"{local.unit_folder() / name}:\n{unit}")
    else:
        echo(f"in your crontab:\n{local.cron_line(home, made)}")
    if not yes and not click.confirm("install this?"):
        echo("nothing was changed")
        return
    write_atomic(Path(made.recipe), text)
    echo(f"{made.name} {local.install(home, made)}")
    if ignored:
        echo(f"not used here: the pipeline parameters {', '.join(ignored)}", err=True)
    if made.cron and not made.paused:
        echo(f"next: {_next_here(made.cron)}")
    if made.kind == "systemd":
        echo(
            "it runs while you are logged in; `loginctl enable-linger` lets it run always", err=True
        )
    echo(f"after each run: {home / local.FOLDER / 'nights.html'}")


@schedule.command("list")
@URL
@HERE
def schedule_list(url: str, here: bool) -> None:
    """List the schedules: when they run, which version, and how overlaps are handled."""
    from nudge.pipelines.cluster import connect, schedules

    if _local(url, here):
        _list_here()
        return
    rows = schedules.find(connect.connect(url))
    if not rows:
        echo("there is no schedule; create one with `nudge schedule apply FILE`")
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


def _list_here() -> None:
    from nudge.pipelines.local import schedules as local

    rows = list(local.schedules(nudge_home()))
    if not rows:
        echo("there is no schedule; create one with `nudge schedule apply FILE`")
        return
    table = Table()
    for name in ("name", "state", "when", "next", "by"):
        table.add_column(name, overflow="fold")
    for row in rows:
        every = row.cron or f"every {row.interval_minutes} min"
        following = _next_here(row.cron) if row.cron and not row.paused else ""
        table.add_row(row.name, "paused" if row.paused else "enabled", every, following, row.kind)
    Screen().print(table)


@schedule.command("pause")
@click.argument("name")
@URL
@HERE
def schedule_pause(name: str, url: str, here: bool) -> None:
    """Disable a schedule; its runs continue, and `nudge schedule apply` enables it."""
    from nudge.pipelines.cluster import connect, schedules

    if _local(url, here):
        from nudge.pipelines.local import schedules as local

        local.install(nudge_home(), replace(local.find(nudge_home(), name), paused=True))
    else:
        schedules.pause(connect.connect(url), name)
    echo(f"{name} paused")


@schedule.command("delete")
@click.argument("name")
@URL
@HERE
def schedule_delete(name: str, url: str, here: bool) -> None:
    """Delete a schedule; on a server, while one of its runs is active it is only disabled."""
    from nudge.pipelines.cluster import connect, schedules

    if _local(url, here):
        from nudge.pipelines.local import schedules as local

        local.remove(nudge_home(), name)
    else:
        schedules.delete(connect.connect(url), name)
    echo(f"{name} deleted")


@schedule.command("night")
@click.argument("name")
def schedule_night(name: str) -> None:
    """Run a schedule of this machine now, as its timer does.

    The run is added to the page `.nudge/schedules/nights.html`, and the retention rules of
    `nudge clean` apply. If the last run of the schedule is still active, this one is left out.

    Exit status: 0 the run finished (promoted or not) or was left out, 1 it failed, 2 the input was
    refused.
    """
    from nudge.pipelines.cli import run as run_command
    from nudge.pipelines.local import history, nights
    from nudge.pipelines.local import schedules as local
    from nudge.pipelines.local.result import keep_result

    home = nudge_home()
    night: dict[str, Any] = {"name": name, "began": time.time(), "state": "refused"}
    with local.one_at_a_time(home, name) as free:
        if not free:
            echo(f"the last run of {name} is still active, so this one is left out", err=True)
            return
        try:
            recipe = load(local.find(home, name).recipe)
            ended = run_command.execute(recipe, home)
            past = history.ended(ended, keep_result(ended))
            ended.lock.close()
            row = past.row()
            keys = ("run_id", "state", "reason", "seconds", "bits_per_byte", "difference")
            night |= {key: row[key] for key in keys}
        except UserError as error:
            night["reason"] = str(error)
        except KeyboardInterrupt:
            night |= {"state": "interrupted", "reason": "it was stopped"}
            raise
        finally:
            page = nights.note(home, night)
        run_command.clean_up(home)
    echo(json.dumps(night, indent=2))
    echo(f"{night['state']}: {page}", err=True)
    if night["state"] in ("failed", "refused"):
        raise SystemExit(1 if night["state"] == "failed" else 2)


@schedule.command("summary")
def schedule_summary() -> None:
    """Write the page of all scheduled runs of this machine, and print its path."""
    from nudge.pipelines.local import nights

    echo(nights.write_page(nudge_home()))


def _when(cron: str) -> str:
    """The next start in UTC (the server's clock unless CRON_SCHEDULE_TIMEZONE changes it) and in
    local time."""
    from nudge.pipelines.cluster.schedules import next_start

    found = next_start(cron)
    return f"{found:%Y-%m-%d %H:%M:%S} UTC ({found.astimezone():%H:%M %Z} local time)"


def _next_here(cron: str) -> str:
    """The next start by this machine's clock."""
    from nudge.pipelines.cluster.schedules import next_start

    now = datetime.datetime.now().astimezone()
    # croniter counts in the zone of its start.
    found = next_start(cron, now).astimezone()
    return f"{found:%Y-%m-%d %H:%M:%S %Z}"
