"""Lookups by exact name in the registry, whose own lookups are inexact (see `names`).

Each function takes a `RegistryClient`. If the server's lookup returns another name or nothing, a
list decides: the server also answers "not found" for more than one match.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from nudge.components.common.clients.registry.names import check_lookup

T = TypeVar("T")

PARALLEL = 8
"""Concurrent requests, over one connection pool."""


async def find_model(client: Any, name: str) -> Any | None:
    """The registered model of exactly this name, or None."""
    found = await client.get_registered_model_by_params(check_lookup(name))
    return _exact(name, [found]) or _exact(name, await list_models(client))


async def find_model_version(client: Any, model_id: str, name: str) -> Any | None:
    """The model's version of exactly this name, or None."""
    found = await client.get_model_version_by_params(model_id, check_lookup(name))
    if found is not None and found.registered_model_id not in (None, model_id):
        found = None
    return _exact(name, [found]) or _exact(name, await list_model_versions(client, model_id))


async def find_environment(client: Any, name: str) -> Any | None:
    """The serving environment of exactly this name, or None."""
    from mr_openapi.exceptions import NotFoundException

    async with client.get_client() as api:
        try:
            found = await api.find_serving_environment(name=name)
        except NotFoundException:
            found = None
        return _exact(name, [found]) or _exact(name, await pages(api.get_serving_environments))


async def list_models(client: Any) -> list[Any]:
    """Every registered model."""
    return await _all(client.get_registered_models)


async def list_model_versions(client: Any, model_id: str) -> list[Any]:
    """Every version of a model, oldest first."""
    return await _all(lambda options: client.get_model_versions(model_id, options))


async def find_model_artifact(client: Any, version_id: str, model: str) -> Any | None:
    """The model artifact that nudge or the registry's client wrote for a version of ``model``.

    They name it after the model. A version that someone else registered may have an artifact with
    another name, which counts if it is the only one.
    """
    from model_registry.types import ModelArtifact

    found = await _all(lambda options: client.get_model_version_artifacts(version_id, options))
    models = [artifact for artifact in found if isinstance(artifact, ModelArtifact)]
    return _exact(model, models) or (models[0] if len(models) == 1 else None)


async def together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results of several calls in order, with at most `PARALLEL` of them at a time."""
    gate = asyncio.Semaphore(PARALLEL)

    async def one(call: Awaitable[T]) -> T:
        async with gate:
            return await call

    return list(await asyncio.gather(*map(one, calls)))


async def pages(get: Callable[..., Awaitable[Any]]) -> list[Any]:
    """The items on all pages of a list in the generated API."""
    items: list[Any] = []
    token = ""
    while True:
        page = await get(page_size="100", next_page_token=token)
        items += page.items or []
        token = page.next_page_token
        if not token:
            return items


async def _all(get: Callable[[Any], Awaitable[list[Any]]]) -> list[Any]:
    from model_registry.types import ListOptions

    options, items = ListOptions(limit=100), []
    while True:
        items += await get(options)
        if not options.next_page_token:
            return items


def _exact(name: str, found: Iterable[Any]) -> Any | None:
    return next((each for each in found if each is not None and each.name == name), None)
