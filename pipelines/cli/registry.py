"""`nudge registry`: copy models from one registry to another."""

import os

import click

from nudge.components.common.core.environment import REGISTRY_URL
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli.output import echo, echo_json


@click.group()
def registry() -> None:
    """Copy registered models between registries.

    A registry is a Kubeflow Model Registry, https://HOST, or MLflow's, mlflow+https://HOST. A
    recipe chooses one with `register.registry_url`, and NUDGE_REGISTRY_URL for all recipes.
    """


@registry.command()
@click.argument("source")
@click.argument("target")
@click.option("--model", "models", multiple=True, help="Only this model. Repeat it for more.")
@click.option("--json", "as_json", is_flag=True, help="Print the new versions as JSON.")
def copy(source: str, target: str, models: tuple[str, ...], as_json: bool) -> None:
    """Copy versions from the registry SOURCE to the registry TARGET.

    SOURCE and TARGET are URLs, or `here` for this machine's registry.

    \b
    nudge registry copy here mlflow+https://mlflow.example.com
    nudge registry copy https://registry.team.svc:8443 here --model notes

    Versions, properties, archived states and what is served are copied; the weights stay where
    their URIs say. Versions that TARGET already has are not changed, so rerunning the command
    finishes an interrupted copy.
    """
    from nudge.components.common.clients.registry.connection import registry_url
    from nudge.components.common.clients.registry.copying import copy_models

    one, other = (_here() if url == "here" else registry_url(url) for url in (source, target))
    if one == other:
        raise UserError(f"{source} and {target} are the same registry")
    copied = copy_models(one, other, list(models) or None)
    if as_json:
        echo_json(copied)
        return
    for model, versions in copied.items():
        echo(f"{model}: {', '.join(versions) or 'nothing new'}")
    if not copied:
        echo(f"{source} has no models")


def _here() -> str:
    from nudge.pipelines.cli import connections

    connections.start()
    return os.environ[REGISTRY_URL]
