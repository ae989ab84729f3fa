"""The commands that move traffic between registered versions: models, promote, split, rollback."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sanitize import visible


def _checked_name(_: click.Context, __: click.Parameter, name: str) -> str:
    from nudge.components.common.clients.registry.names import check_lookup

    return check_lookup(name) if name else ""


MODEL = click.option(
    "--model",
    default="",
    callback=_checked_name,
    help="The registered model; default: the only one that there is.",
)
RECIPE = click.option(
    "--recipe",
    "recipe_name",
    default="",
    help="Take the section `deploy` (target, smoke prompt, ...) of this recipe.",
)
TARGET = click.option(
    "--target",
    type=click.Choice(["local", "kserve"]),
    help="This machine, or the cluster; default: as the recipe says, else where it is served.",
)


@click.command()
@MODEL
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on stdout.")
def models(model: str, as_json: bool) -> None:
    """List registered versions: what they scored, and which of them are served."""
    from nudge.pipelines.local.services import NothingRun

    try:
        rows = _rows(model)
    except NothingRun as nothing:
        rows = []
        click.echo(nothing, err=True)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    from nudge.pipelines.cli.screen import Screen

    for name in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == name]
        served = next((row for row in of_model if row["endpoint"]), {"endpoint": "not served"})
        hint = " (not running: `nudge services up`)" if served.get("running") is False else ""
        click.echo(visible(f"{name}  {served['endpoint']}{hint}"))  # a line by itself, never folded
        table = Table()
        table.add_column("version", no_wrap=True)
        table.add_column("made", no_wrap=True)
        for column in ("bits per byte", "beside base", "traffic"):
            table.add_column(column, justify="right")
        for row in of_model:
            table.add_row(
                row["version"] + (" (archived)" if row["state"] == "ARCHIVED" else ""),
                row["made"],
                "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
                "" if row["difference"] is None else f"{row['difference']:+.4f}",
                f"{row['share']} %" if row["share"] else "",
            )
        Screen().print(table)


@click.command()
@click.argument("version")
@MODEL
@RECIPE
@TARGET
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="Move the model to this port of this machine; default: it keeps its address.",
)
def promote(
    version: str, model: str, recipe_name: str, target: str | None, port: int | None
) -> None:
    """Give VERSION all of the model's traffic.

    It is brought up beside what is served, tested, and only then the traffic moves. Safe to repeat:
    what a killed one left undone, the next one does.
    """
    _shift(_settings(recipe_name, target, port), model, {version: 100})


@click.command()
@click.argument("shares", nargs=-1, required=True, metavar="VERSION=PERCENT...")
@MODEL
@RECIPE
@TARGET
def split(shares: tuple[str, ...], model: str, recipe_name: str, target: str | None) -> None:
    """Share the traffic between versions, such as `nudge split v1=90 v2=10`."""
    wanted: dict[str, int] = {}
    for given in shares:
        version, _, percent = given.rpartition("=")
        if not version or not percent.isdigit():
            raise UserError(f"{given!r}: expected VERSION=PERCENT, such as v2=10")
        wanted[version] = int(percent)
    _shift(_settings(recipe_name, target), model, wanted)


@click.command()
@click.option("--to", "version", default="", help="Default: the version served before.")
@MODEL
@RECIPE
@TARGET
def rollback(version: str, model: str, recipe_name: str, target: str | None) -> None:
    """Go back to the version that had all of the traffic before this one."""
    from nudge.components.common.clients.registry.releases import find_served
    from nudge.components.deploy.deploy import still_before, version_before

    settings = _settings(recipe_name, target)
    _take_registry(settings)
    with _registry() as ask:
        name = _model(ask, model)
        check = None
        if not version:
            version = version_before(settings, name, ask(find_served(name)))
            check = still_before(version)
    _shift(settings, name, {version: 100}, check)


@click.command()
@click.argument("uri")
@click.option(
    "--registry-url",
    default="",
    help="The registry's URL, or `embedded`; default: NUDGE_REGISTRY_URL, or this machine's.",
)
@click.option(
    "--store",
    default="",
    help="The object store's URL, `aws`, or `embedded`; default: this machine's, or AWS_S3_ENDPOINT"
    " if a registry is given. The credentials of a store are taken from AWS_ACCESS_KEY_ID and"
    " AWS_SECRET_ACCESS_KEY.",
)
@click.option("--bucket", default="", help="Where the registration of an image is kept.")
@click.option(
    "--home",
    type=click.Path(path_type=Path),
    help="The folder of the embedded parts; default: NUDGE_HOME, or `.nudge`.",
)
def register(uri: str, registry_url: str, store: str, bucket: str, home: Path | None) -> None:
    """Finish a registration that an outage of the model registry interrupted.

    URI is the version's folder in the object store; the run's error names the whole command.
    """
    from nudge.components.register.pending import finish

    if home:
        os.environ["NUDGE_HOME"] = str(home.resolve())
    if bucket:
        os.environ["AWS_S3_BUCKET"] = bucket
    _connect(registry_url, store)
    told = finish(uri, any_registry=bool(registry_url))
    click.echo(
        f"{told['registered_model']} {told['version']} is registered; `nudge promote "
        f"{told['version']} --model {told['registered_model']}` serves it"
    )


def _connect(registry: str, store: str) -> None:
    """Set the variables of the registry and the store that a command names; starts what is
    embedded. Raises `UserError` if the credentials of a store are missing."""
    from nudge.components.common.clients.registry.connection import registry_url
    from nudge.components.common.core.processes import nudge_home
    from nudge.components.register.pending import AWS, EMBEDDED
    from nudge.pipelines.local import services

    if registry and registry != EMBEDDED:
        os.environ["NUDGE_REGISTRY_URL"] = registry_url(registry)
    elif registry:
        os.environ.pop("NUDGE_REGISTRY_URL", None)
    if not store:
        _start()
        return
    if store == AWS:
        os.environ.pop("AWS_S3_ENDPOINT", None)
    elif store != EMBEDDED:
        os.environ["AWS_S3_ENDPOINT"] = store
    if store != EMBEDDED:
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        if missing := [name for name in keys if not os.environ.get(name)]:
            raise UserError(
                f"the credentials of the store {store} are missing: set {' and '.join(missing)}"
            )
    # What is named here stands in for the embedded part.
    instead = {
        name: os.environ.get(name, "")
        for name in services.GIVEN
        if (store != EMBEDDED if name in services.CONNECTION else os.environ.get(name))
    }
    if store == EMBEDDED or "NUDGE_REGISTRY_URL" not in instead:
        started = services.up(nudge_home(), instead=instead)
        os.environ.update({name: value for name, value in started.items() if value})
    else:
        os.environ.pop("NUDGE_EMBEDDED", None)


def _shift(settings: Any, model: str, shares: dict[str, int], check: Any = None) -> None:
    """Move a model's traffic; what is wrong with the arguments is said before anything starts."""
    from nudge.components.common.clients.registry.releases import find_version
    from nudge.components.deploy.deploy import serve
    from nudge.components.deploy.traffic import checked_shares, unchecked
    from nudge.pipelines.cli import display

    _take_registry(settings)
    with _registry() as ask:
        name = _model(ask, model)
        for version in checked_shares(shares):
            ask(find_version(name, version))
    _start()
    note = functools.partial(display.stage, name)
    result = serve(settings, name, shares, note, check or unchecked)
    told = ", ".join(f"{version} {share} %" for version, share in result["shares"].items())
    click.echo(visible(f"{name}: {told} at {result['endpoint']}"))


def _take_registry(settings: Any) -> None:
    """Take the registry that a recipe names.

    A cluster has its own: for one, raises `UserError` if none is given.
    """
    from nudge.components.common.clients.registry.connection import registry_url

    if settings.registry_url or settings.target == "kserve":
        os.environ["NUDGE_REGISTRY_URL"] = registry_url(settings.registry_url)


def _start() -> None:
    """The data connection and the registry of this machine, unless a registry is given."""
    from nudge.components.common.core.processes import nudge_home
    from nudge.pipelines.local import services

    home = nudge_home()
    if url := os.environ.get("NUDGE_REGISTRY_URL"):
        # The objects of a run that was given a registry alone are in this machine's store.
        if services.has_store(home) and not os.environ.get("AWS_S3_ENDPOINT"):
            os.environ.update(services.up(home, instead={"NUDGE_REGISTRY_URL": url}))
        return
    begun = services.resting(home)
    os.environ.update(services.up(home, instead=services.given_store(home)))
    if begun:
        told = f"started {' and '.join(begun)}; `nudge services down` ends what runs"
        click.echo(told, err=True)


@contextlib.contextmanager
def _registry() -> Iterator[Callable[[Any], Any]]:
    """What asks the registry that is given, else this machine's; no part is started for it."""
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.core.processes import nudge_home
    from nudge.pipelines.local import services

    given = os.environ.get("NUDGE_REGISTRY_URL")
    reading = services.registry_to_read(nudge_home())
    with contextlib.nullcontext(given) if given else reading as url:
        yield functools.partial(with_registry, registry_url(url))


def _settings(recipe_name: str, target: str | None, port: int | None = None) -> Any:
    from nudge.components.deploy.settings import deploy_settings
    from nudge.pipelines.recipes import load

    recipe = load(recipe_name).text if recipe_name else "{}"
    return deploy_settings(recipe, target=target or "", port=port or "")


def _model(ask: Callable[[Any], Any], given: str) -> str:
    if given:
        return given
    names = ask(_names)
    if len(names) != 1:
        raise UserError(
            f"there are {len(names)} registered models ({', '.join(names)}); give --model"
        )
    return str(names[0])


def _rows(model: str) -> list[dict[str, Any]]:
    with _registry() as ask:
        names = [model] if model else ask(_names)
        return [row for name in names for row in _rows_of(ask, name)]


def _rows_of(ask: Callable[[Any], Any], name: str) -> Iterator[dict[str, Any]]:
    import datetime

    from nudge.components.common.clients.registry.releases import find_served, list_versions
    from nudge.components.common.core.processes import nudge_home
    from nudge.pipelines.local import services

    served = ask(find_served(name))
    running = services.serves(nudge_home(), name, served.endpoint) if served else None
    for version in ask(list_versions(name)):
        made = datetime.datetime.fromtimestamp(version.created_ms / 1000)
        scored = version.properties
        share = served.shares.get(version.name, 0) if served else 0
        yield {
            "model": name,
            "version": version.name,
            "made": made.isoformat(" ", "minutes"),
            "bits_per_byte": scored.get("candidate.bits_per_byte"),
            "difference": scored.get("difference_bits_per_byte"),
            "state": "ARCHIVED" if version.archived else "LIVE",
            "share": share,
            "endpoint": served.endpoint if served and share else None,
            "running": running if share else None,
            "uri": version.uri,
        }


async def _names(client: Any) -> list[str]:
    from nudge.components.common.clients.registry.lookup import list_models

    return [model.name for model in await list_models(client)]
