"""The commands that change a registered version: promote, split, rollback, register."""

import functools
import os
from pathlib import Path
from typing import Any

import click

from nudge.components.common.core.environment import HOME, S3_BUCKET
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli import connections, display
from nudge.pipelines.cli.connections import MODEL
from nudge.pipelines.cli.output import echo
from nudge.pipelines.recipes import load

RECIPE = click.option(
    "--recipe",
    "recipe_name",
    default="",
    help="Use the section `deploy` (target, smoke prompt, ...) of this recipe.",
)
TARGET = click.option(
    "--target",
    type=click.Choice(["local", "kserve"]),
    help="Serve on this machine or the cluster; default: the recipe's, or where it is served now.",
)


@click.command()
@click.argument("version", shell_complete=connections.complete_version)
@MODEL
@RECIPE
@TARGET
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="Serve the model at this port of this machine; default: it keeps its address.",
)
def promote(
    version: str, model: str, recipe_name: str, target: str | None, port: int | None
) -> None:
    """Give VERSION all of the model's traffic.

    The version starts next to the one served now and is tested; only then the traffic moves.
    `nudge models` lists the versions; the first or last characters of a name are enough if they
    fit only one. It is safe to repeat: if a command was killed, the next one
    finishes its work.
    """
    _shift(read_settings(recipe_name, target, port), model, {version: 100})


@click.command()
@click.argument("shares", nargs=-1, required=True, metavar="VERSION=PERCENT...")
@MODEL
@RECIPE
@TARGET
def split(shares: tuple[str, ...], model: str, recipe_name: str, target: str | None) -> None:
    """Divide the traffic between versions, for example `nudge split v1=90 v2=10`.

    The percentages must add up to 100. All versions are started and tested first.
    """
    wanted: dict[str, int] = {}
    for share in shares:
        version, _, percent = share.rpartition("=")
        if not version or not percent.isdigit():
            raise UserError(f"{share!r}: expected VERSION=PERCENT, such as v2=10")
        wanted[version] = int(percent)
    _shift(read_settings(recipe_name, target), model, wanted)


@click.command()
@click.option(
    "--to",
    "version",
    default="",
    help="The version to go back to; default: the one served before.",
    shell_complete=connections.complete_version,
)
@MODEL
@RECIPE
@TARGET
def rollback(version: str, model: str, recipe_name: str, target: str | None) -> None:
    """Go back to the version that had all of the traffic before this one.

    It is started and tested before the traffic moves, as in `nudge promote`.
    """
    from nudge.components.common.clients.registry.releases import find_served
    from nudge.components.deploy.way_back import still_before, version_before

    settings = read_settings(recipe_name, target)
    connections.use_registry_of(settings)
    with connections.registry() as ask:
        name = connections.model_name(ask, model)
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
    " if a registry is named. The credentials of a store come from AWS_ACCESS_KEY_ID and"
    " AWS_SECRET_ACCESS_KEY.",
)
@click.option(
    "--bucket", default="", help="The bucket in which the registration of an image is kept."
)
@click.option(
    "--home",
    type=click.Path(path_type=Path),
    help="The folder of the embedded services; default: NUDGE_HOME, or `.nudge`.",
)
@click.option(
    "--sha256",
    default="",
    help="The digest of the pending registration, as the run printed it. A registration that"
    " somebody changed in the bucket is refused.",
)
def register(
    uri: str, registry_url: str, store: str, bucket: str, home: Path | None, sha256: str
) -> None:
    """Finish a registration that an outage of the model registry interrupted.

    URI is the version's folder in the object store. The error of the interrupted run contains the
    complete command.
    """
    from nudge.components.register.pending import finish

    if home:
        os.environ[HOME] = str(home.resolve())
    if bucket:
        os.environ[S3_BUCKET] = bucket
    connections.connect(registry_url, store)
    done = finish(uri, sha256, any_registry=bool(registry_url))
    text = (
        f"{done['registered_model']} {done['version']} is registered; serve it with `nudge promote "
        f"{done['version']} --model {done['registered_model']}`"
    )
    echo(text)


def _shift(settings: Any, model: str, shares: dict[str, int], check: Any = None) -> None:
    """Move a model's traffic; wrong arguments are reported before anything starts."""
    from nudge.components.common.clients.registry.releases import find_version
    from nudge.components.deploy.deploy import serve
    from nudge.components.deploy.traffic import checked_shares, unchecked

    connections.use_registry_of(settings)
    with connections.registry() as ask:
        name = connections.model_name(ask, model)
        full = {connections.version_name(ask, name, each): share for each, share in shares.items()}
        if len(full) < len(shares):
            raise UserError(f"{', '.join(shares)} name one version twice; name each version once")
        shares = full
        for version in checked_shares(shares):
            ask(find_version(name, version))
    connections.start()
    note = functools.partial(display.stage, name)
    result = serve(settings, name, shares, note, check or unchecked)
    moved = ", ".join(f"{version} {share} %" for version, share in result["shares"].items())
    echo(f"{name}: {moved} at {result['endpoint']}")


def read_settings(recipe_name: str, target: str | None, port: int | None = None) -> Any:
    """The deploy settings of a recipe (default: none), with what the command line overrides."""
    from nudge.components.deploy.settings import deploy_settings

    recipe = load(recipe_name).text if recipe_name else "{}"
    return deploy_settings(recipe, target=target or "", port=port or "")
