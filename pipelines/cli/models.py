"""`nudge models`: the registered versions, their figures, and which of them are served."""

import datetime
import json
from collections.abc import Iterator
from typing import Any

import click
from rich.table import Table

from nudge.components.common.core.environment import nudge_home
from nudge.pipelines.cli import connections
from nudge.pipelines.cli.connections import MODEL
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.screen import Screen

EMPTY = (
    "nothing is registered yet; `nudge run` registers a model if it is better than its base model"
)


@click.command()
@MODEL
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on stdout.")
def models(model: str, as_json: bool) -> None:
    """List the registered versions, their scores, and which of them are served.

    "difference" is the difference to the base model in bits per byte: negative is better.
    """
    from nudge.pipelines.local.services import NothingRun

    try:
        rows = model_rows(model)
        if not rows:
            echo(f"no models: {EMPTY}", err=True)
    except NothingRun as nothing:
        rows = []
        echo(nothing, err=True)
    if as_json:
        echo(json.dumps(rows, indent=2))
        return
    for name in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == name]
        served = next((row for row in of_model if row["endpoint"]), {"endpoint": "not served"})
        hint = " (not running: `nudge services up`)" if served.get("running") is False else ""
        echo(f"{name}  {served['endpoint']}{hint}")  # on a line of its own, never folded
        table = Table()
        table.add_column("version", no_wrap=True)
        table.add_column("made", no_wrap=True)
        for column in ("bits per byte", "difference", "traffic"):
            table.add_column(column, justify="right")
        for row in of_model:
            table.add_row(
                f"{row['version']}\n{state}" if (state := _state(row)) else row["version"],
                row["made"],
                "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
                "" if row["difference"] is None else f"{row['difference']:+.4f}",
                f"{row['share']} %" if row["share"] else "",
            )
        Screen().print(table)


def _state(row: dict[str, Any]) -> str:
    """What a reader must know about a version besides its figures, in brackets."""
    words = [row["approval"]] if row["approval"] not in (None, "approved") else []
    words += ["archived"] if row["state"] == "ARCHIVED" else []
    words = ["awaiting approval" if word == "awaiting" else word for word in words]
    return f"({', '.join(words)})" if words else ""


def model_rows(model: str) -> list[dict[str, Any]]:
    """One row per version of a model, or of every model if the name is empty."""
    with connections.registry() as ask:
        names = [model] if model else ask(connections.list_names)
        return [row for name in names for row in _rows_of(ask, name)]


def _rows_of(ask: connections.Ask, name: str) -> Iterator[dict[str, Any]]:
    from nudge.components.common.artifacts.approval import read_approval
    from nudge.components.common.clients.registry.releases import find_served, list_versions
    from nudge.pipelines.local import serving

    served = ask(find_served(name))
    running = serving.serves(nudge_home(), name, served.endpoint) if served else None
    for version in ask(list_versions(name)):
        made = datetime.datetime.fromtimestamp(version.created_ms / 1000)
        scored = version.properties
        approval = read_approval(scored)
        share = served.shares.get(version.name, 0) if served else 0
        yield {
            "model": name,
            "version": version.name,
            "made": made.isoformat(" ", "minutes"),
            "bits_per_byte": scored.get("candidate.bits_per_byte"),
            "difference": scored.get("difference_bits_per_byte"),
            "approval": approval.state if approval else None,
            "state": "ARCHIVED" if version.archived else "LIVE",
            "share": share,
            "endpoint": served.endpoint if served and share else None,
            "running": running if share else None,
            "uri": version.uri,
        }
