"""The commands that move traffic between registered versions: models, promote, split, rollback."""

import json
from typing import Any

import click
from nudge.components.common.errors import UserError

MODEL = click.option(
    "--model", default="", help="The registered model; default: the only one that there is."
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
    rows = _rows(model)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    for name in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == name]
        endpoint = next((row["endpoint"] for row in of_model if row["endpoint"]), "not served")
        table = Table(title=f"{name}  {endpoint}", title_justify="left")
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
        Console().print(table)


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
    from nudge.components.deploy.deploy import rollback as roll_back

    settings = _settings(recipe_name, target)
    _connect(settings)
    _tell(roll_back(settings, registered_model=_model(model), version=version))


@click.command()
@click.argument("uri")
@click.option("--registry-url", default="", help="Default: NUDGE_REGISTRY_URL, or this machine's.")
def register(uri: str, registry_url: str) -> None:
    """Finish a registration that the model registry did not take when the run asked it.

    URI is the version's folder in the object store; the run's error names it.
    """
    import os

    from nudge.components.register.unfinished import finish

    if registry_url:
        os.environ["NUDGE_REGISTRY_URL"] = registry_url
    _connect()
    told = finish(uri)
    click.echo(
        f"{told['registered_model']} {told['version']} is registered; `nudge promote "
        f"{told['version']} --model {told['registered_model']}` serves it"
    )


def _shift(settings: Any, model: str, shares: dict[str, int]) -> None:
    from nudge.components.deploy.deploy import serve

    _connect(settings)
    _tell(serve(settings, _model(model), shares))


def _tell(result: dict[str, Any]) -> None:
    shares = ", ".join(f"{name} {share} %" for name, share in result["shares"].items())
    click.echo(f"{result['served_model']}: {shares} at {result['endpoint']}")


def _connect(settings: Any = None) -> None:
    """The data connection and the registry of this machine, unless others are given.

    A cluster has its own registry: for one, raises `UserError` if none is given.
    """
    import os

    if settings is not None:
        from nudge.components.common.registry import registry_url

        if settings.registry_url or settings.target == "kserve":
            os.environ["NUDGE_REGISTRY_URL"] = registry_url(settings.registry_url)

    from nudge.components.common.processes import nudge_home
    from nudge.pipelines.local import services

    if not os.environ.get("NUDGE_REGISTRY_URL"):
        os.environ.update(services.up(nudge_home()))


def _settings(recipe_name: str, target: str | None, port: int | None = None) -> Any:
    from nudge.components.common.recipe import step_settings
    from nudge.components.deploy.settings import DeploySettings
    from nudge.pipelines.recipes import load

    recipe = load(recipe_name).text if recipe_name else "{}"
    return step_settings(DeploySettings, "deploy", recipe, target=target or "", port=port or "")


def _model(given: str) -> str:
    if given:
        return given
    names = _ask(_names)
    if len(names) != 1:
        raise UserError(
            f"there are {len(names)} registered models ({', '.join(names)}); give --model"
        )
    return str(names[0])


def _rows(model: str) -> list[dict[str, Any]]:
    import datetime

    from nudge.components.common.releases import find_served, list_versions

    rows = []
    for name in [model] if model else _ask(_names):
        served = _ask(find_served(name))
        for version in _ask(list_versions(name)):
            made = datetime.datetime.fromtimestamp(version.created_ms / 1000)
            scored = version.properties
            share = served.shares.get(version.name, 0) if served else 0
            rows.append(
                {
                    "model": name,
                    "version": version.name,
                    "made": made.isoformat(" ", "minutes"),
                    "bits_per_byte": scored.get("candidate.bits_per_byte"),
                    "difference": scored.get("difference_bits_per_byte"),
                    "state": "ARCHIVED" if version.archived else "LIVE",
                    "share": share,
                    "endpoint": served.endpoint if served and share else None,
                    "uri": version.uri,
                }
            )
    return rows


async def _names(client: Any) -> list[str]:
    from model_registry.types import ListOptions

    options, names = ListOptions(limit=100), []
    while True:
        names += [model.name for model in await client.get_registered_models(options)]
        if not options.next_page_token:
            return names


def _ask(work: Any) -> Any:
    from nudge.components.common.registry import registry_url, with_registry

    _connect()
    return with_registry(registry_url(), work)
