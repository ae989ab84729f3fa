"""Which object store and model registry a command uses: named ones, or the embedded ones."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from nudge.components.common.core.environment import (
    CONNECTION,
    EMBEDDED,
    REGISTRY_URL,
    S3_ACCESS_KEY,
    S3_ENDPOINT,
    S3_SECRET_KEY,
    nudge_home,
)
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli.output import echo

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Ask = Callable[[Any], Any]
"""Runs work of a registry client, such as `find_version(...)`, and returns its result."""


def connect(registry: str, store: str) -> None:
    """Set the variables of the registry and the store that a command names; starts embedded ones.

    Raises `UserError` if the credentials of a store are missing.
    """
    from nudge.components.common.clients.registry.connection import registry_url
    from nudge.components.register.pending import AWS
    from nudge.components.register.pending import EMBEDDED as PENDING_EMBEDDED
    from nudge.pipelines.local import services

    if registry and registry != PENDING_EMBEDDED:
        os.environ[REGISTRY_URL] = registry_url(registry)
    elif registry:
        os.environ.pop(REGISTRY_URL, None)
    if not store:
        start()
        return
    if store == AWS:
        os.environ.pop(S3_ENDPOINT, None)
    elif store != PENDING_EMBEDDED:
        os.environ[S3_ENDPOINT] = store
    if store != PENDING_EMBEDDED:
        keys = (S3_ACCESS_KEY, S3_SECRET_KEY)
        if missing := [name for name in keys if not os.environ.get(name)]:
            raise UserError(
                f"the credentials of the store {store} are missing: set {' and '.join(missing)}"
            )
    # What is named here is used instead of an embedded service.
    instead = {
        name: os.environ.get(name, "")
        for name in services.VARIABLES
        if (store != PENDING_EMBEDDED if name in CONNECTION else os.environ.get(name))
    }
    if store == PENDING_EMBEDDED or REGISTRY_URL not in instead:
        started = services.up(nudge_home(), instead=instead)
        os.environ.update({name: value for name, value in started.items() if value})
    else:
        os.environ.pop(EMBEDDED, None)


def use_registry_of(settings: Any) -> None:
    """Use the registry that a recipe's settings name.

    A cluster has its own registry, so for a cluster this raises `UserError` if none is named.
    """
    from nudge.components.common.clients.registry.connection import registry_url

    if settings.registry_url or settings.target == "kserve":
        os.environ[REGISTRY_URL] = registry_url(settings.registry_url)


def start() -> None:
    """Start this machine's object store and registry and set their variables, unless the
    environment names a registry."""
    from nudge.pipelines.local import services

    home = nudge_home()
    if url := os.environ.get(REGISTRY_URL):
        # A run with a named registry and no named store put its objects into this machine's store.
        if services.has_store(home) and not os.environ.get(S3_ENDPOINT):
            os.environ.update(services.up(home, instead={REGISTRY_URL: url}))
        return
    stopped = services.resting(home)
    os.environ.update(services.up(home, instead=services.env_store(home)))
    if stopped:
        echo(f"started {' and '.join(stopped)}; stop with `nudge services down`", err=True)


@contextlib.contextmanager
def registry() -> Iterator[Ask]:
    """Asks the registry that the environment names, or this machine's; starts no service."""
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.pipelines.local import services

    named = os.environ.get(REGISTRY_URL)
    reading = services.registry_to_read(nudge_home())
    with contextlib.nullcontext(named) if named else reading as url:
        yield functools.partial(with_registry, registry_url(url))


def _checked_name(_: click.Context, __: click.Parameter, name: str) -> str:
    from nudge.components.common.clients.registry.names import check_lookup

    return check_lookup(name) if name else ""


MODEL = click.option(
    "--model",
    default="",
    callback=_checked_name,
    help="The registered model; may be omitted if there is only one.",
)


def model_name(ask: Ask, name: str) -> str:
    """``name``, or the only registered model if it is empty; raises `UserError` if there is not
    exactly one."""
    if name:
        return name
    names = ask(list_names)
    if not names:
        raise UserError(
            "there are no models yet: a run registers one if it is better than its base model; "
            "start with `nudge run`"
        )
    if len(names) != 1:
        raise UserError(
            f"there are {len(names)} registered models ({', '.join(names)}); choose one with "
            "--model NAME"
        )
    return str(names[0])


def unique(begun: str, known: Sequence[str], what: str) -> str:
    """The one of ``known`` that equals ``begun``, begins with it, or ends with it.

    Names of runs and versions end in digits of their own (20261126-144205-ffc6), so ``ffc6`` is
    enough. ``begun`` itself is returned if it fits none, for the lookup's own message. Raises
    `UserError` if it fits several.
    """
    if begun in known or not begun:
        return begun
    fits = [name for name in known if name.startswith(begun)]
    fits = fits or [name for name in known if name.endswith(begun)]
    if len(fits) > 1:
        more = f" and {len(fits) - 4} more" if len(fits) > 4 else ""
        raise UserError(
            f"{begun!r} fits {len(fits)} {what}s ({', '.join(fits[-4:])}{more}); "
            "type more of the name"
        )
    return fits[0] if fits else begun


def version_name(ask: Ask, model: str, begun: str) -> str:
    """The full name of a version of a model; see `unique`."""
    from nudge.components.common.clients.registry.releases import list_versions

    return unique(begun, [each.name for each in ask(list_versions(model))], "version")


def complete_version(ctx: click.Context, _: click.Parameter, begun: str) -> "list[CompletionItem]":
    """The versions that a shell offers; starts no service."""
    from click.shell_completion import CompletionItem

    from nudge.components.common.clients.registry.releases import list_versions

    with contextlib.suppress(UserError, OSError), registry() as ask:
        wanted = ctx.params.get("model") or ""
        names = [wanted] if wanted else ask(list_names)
        versions = [each.name for name in names for each in ask(list_versions(name))]
        return [CompletionItem(each) for each in versions if each.startswith(begun)]
    return []


async def list_names(client: Any) -> list[str]:
    """The names of all registered models."""
    from nudge.components.common.clients.registry.lookup import list_models

    return [model.name for model in await list_models(client)]
