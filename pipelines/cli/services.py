"""`nudge services`: the embedded object store, model registry and served models."""

import json

import click

from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli import display
from nudge.pipelines.cli.output import echo


@click.group()
def services() -> None:
    """Start, stop and show the embedded object store, model registry and served models.

    `nudge run` starts them when it needs them. Their data is kept in `.nudge/` in the current
    directory (or in NUDGE_HOME) when they stop.
    """


@services.command("up")
@click.option("--store-port", type=click.IntRange(1, 65535), help="Default: a free port.")
@click.option("--registry-port", type=click.IntRange(1, 65535), help="Default: a free port.")
def up(store_port: int | None, registry_port: int | None) -> None:
    """Start what is not running, with its earlier data, and serve the models served before."""
    from nudge.pipelines.local import services as local_services
    from nudge.pipelines.local import serving
    from nudge.pipelines.local.parts import REGISTRY, STORE

    ports = {STORE: store_port or 0, REGISTRY: registry_port or 0}
    home = nudge_home()
    serving.restore(home, local_services.up(home, ports), display.stage)
    _show()


@services.command("down")
def down() -> None:
    """Stop every service and served model, unless a run is active; their data is kept."""
    from nudge.pipelines.local import services as local_services
    from nudge.pipelines.local.run import under_way

    home = nudge_home()
    if runs := under_way(home):
        raise UserError(
            f"{', '.join(runs)} is active and needs the services; wait until it ends, or stop it "
            "first (Ctrl-C in the terminal of `nudge run`)"
        )
    stopped = local_services.down(home)
    echo("stopped " + ", ".join(stopped) if stopped else "nothing was running")


@services.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on stdout.")
def status(as_json: bool) -> None:
    """Show what is running, its address, and how much memory it uses."""
    _show(as_json)


def _show(as_json: bool = False) -> None:
    from nudge.pipelines.local import services as local_services

    rows = local_services.status(nudge_home())
    if as_json:
        echo(json.dumps(rows, indent=2))
    elif rows:
        display.parts(rows)
    else:
        echo("nothing is running; `nudge services up` starts the services")
