"""A version's entry in the Model Registry: written in steps, each only if it is missing."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from nudge.components.common.artifacts.comparison import RECORD
from nudge.components.common.clients.registry.lookup import (
    find_model,
    find_model_artifact,
    find_model_version,
    list_model_versions,
    list_models,
)
from nudge.components.common.clients.registry.names import refuse_confusable
from nudge.components.common.clients.registry.values import read_properties, storable
from nudge.components.common.core.errors import UserError

FORMAT_NAME, FORMAT_VERSION = "vLLM", "1"
"""The model format that OpenShift AI expects for serving language models."""


@dataclass(frozen=True)
class Registration:
    """Everything that is registered about a version; ``group`` is the namespace of its run."""

    model_name: str
    version: str
    uri: str
    run_id: str
    author: str
    description: str
    group: str
    registry_name: str
    properties: dict[str, str | int | float | bool]


def enter(url: str, entry: Registration) -> dict[str, Any]:
    """Create the missing parts of a registration; returns the names and ids for its lineage."""
    from nudge.components.common.clients.registry.connection import with_registry
    from nudge.components.common.clients.registry.releases import note_properties

    async def complete(client: Any) -> tuple[str, str]:
        model = await _model(client, entry)
        found = await _version(client, model.id, entry)
        registered_by = read_properties(found.custom_properties).get("run_id")
        if registered_by != entry.run_id:
            raise UserError(
                f"{entry.model_name} {entry.version} is registered already, by run "
                f"{registered_by!r}; choose another version"
            )
        # A resumed run may have been compared with another incumbent this time.
        compared = {key: str(entry.properties[key]) for key in RECORD if key in entry.properties}
        known = found.custom_properties or {}
        if any(known.get(key) != value for key, value in compared.items()):
            await note_properties(str(found.id), compared)(client)
        await _artifact(client, found.id, entry)
        return str(model.id), str(found.id)

    model_id, version_id = with_registry(url, complete)
    return {
        "registered_model": entry.model_name,
        "registered_model_id": model_id,
        "version": entry.version,
        "version_id": version_id,
        "registry": entry.registry_name,
    }


async def _model(client: Any, entry: Registration) -> Any:
    from model_registry.types import RegisteredModel

    async def create() -> Any:
        existing = [model.name for model in await list_models(client)]
        refuse_confusable("model", entry.model_name, existing)
        return await client.upsert_registered_model(
            RegisteredModel(name=entry.model_name, owner=entry.author)
        )

    return await _find_or_create(
        f"model {entry.model_name!r}", lambda: find_model(client, entry.model_name), create
    )


async def _version(client: Any, model_id: str, entry: Registration) -> Any:
    from model_registry.types import ModelVersion

    async def create() -> Any:
        existing = [version.name for version in await list_model_versions(client, model_id)]
        refuse_confusable("version", entry.version, existing)
        fresh = ModelVersion(
            name=entry.version,
            author=entry.author,
            description=entry.description,
            custom_properties=storable(entry.properties),
        )
        return await client.register_version(fresh, model_id, entry.uri)

    return await _find_or_create(
        f"version {entry.version!r}",
        lambda: find_model_version(client, model_id, entry.version),
        create,
    )


async def _artifact(client: Any, version_id: str, entry: Registration) -> Any:
    from model_registry.types import ModelArtifact

    async def create() -> Any:
        artifact = ModelArtifact(
            name=entry.model_name,
            uri=entry.uri,
            model_format_name=FORMAT_NAME,
            model_format_version=FORMAT_VERSION,
            model_source_kind="kfp",
            model_source_class="pipelinerun",
            model_source_group=entry.group,
            model_source_id=entry.run_id,
            model_source_name=entry.run_id,
        )
        return await client.upsert_model_version_artifact(artifact, version_id)

    return await _find_or_create(
        f"artifact {entry.model_name!r}",
        lambda: find_model_artifact(client, version_id, entry.model_name),
        create,
    )


async def _find_or_create(
    what: str, find: Callable[[], Awaitable[Any]], create: Callable[[], Awaitable[Any]]
) -> Any:
    """The result of ``find``, else of ``create``; another process may be creating the same."""
    from mr_openapi.exceptions import ConflictException

    found = await find()
    if found is None:
        try:
            return await create()
        except ConflictException as error:
            found = await find()
            if found is None:
                raise UserError(
                    f"the registry says that the {what} exists already ({error.body}), but lists "
                    "none with exactly this name; choose another name"
                ) from None
    return found
