"""Copies registered models between registries: versions, artifacts, states, and what is served."""

from dataclasses import dataclass
from typing import Any

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.lookup import (
    find_model,
    find_model_artifact,
    find_model_version,
    list_model_versions,
    list_models,
    pages,
)
from nudge.components.common.clients.registry.names import refuse_confusable
from nudge.components.common.clients.registry.releases import (
    Served,
    archive,
    find_served,
    find_version,
    note_served,
)
from nudge.components.common.clients.registry.values import read_properties, storable
from nudge.components.common.core.errors import UserError


@dataclass(frozen=True)
class _Model:
    """A registered model as its registry has it; each version with its artifact."""

    name: str
    owner: str
    versions: list[tuple[Any, Any]]
    served: Served | None
    environment: str
    runtime: str


def copy_models(source: str, target: str, names: list[str] | None = None) -> dict[str, list[str]]:
    """Copy models that ``target`` lacks, or lacks versions of; returns the new versions by model.

    Ids and times of creation are the target's own. A version of the same name stays as it is if it
    has the same URI, and raises `UserError` if not. What is served is copied unless the target has
    a record of its own.
    """
    found = names or [model.name for model in with_registry(source, list_models)]
    return {name: _write(target, _read(source, name)) for name in found}


def _read(source: str, name: str) -> _Model:
    async def work(client: Any) -> _Model:
        model = await find_model(client, name)
        if model is None:
            raise UserError(f"the registry {source} has no model {name!r}")
        versions = []
        for version in await list_model_versions(client, model.id):
            artifact = await find_model_artifact(client, version.id, name)
            if artifact is not None:  # else its registration was interrupted
                versions.append((version, artifact))
        served = await find_served(name)(client)
        environment, runtime = "", ""
        async with client.get_client() as api:
            if served is not None:
                by_id = {each.id: each.name for each in await pages(api.get_serving_environments)}
                for service in await pages(api.get_inference_services):
                    if service.name == name and str(service.registered_model_id) == str(model.id):
                        environment = str(by_id.get(service.serving_environment_id) or "nudge")
                        runtime = str(service.runtime or "")
        owner = str(model.owner or "")
        return _Model(name, owner, versions, served, environment, runtime)

    return with_registry(source, work)


def _write(target: str, model: _Model) -> list[str]:
    async def work(client: Any) -> list[str]:
        from model_registry.types import RegisteredModel

        entry = await find_model(client, model.name)
        if entry is None:
            existing = [each.name for each in await list_models(client)]
            refuse_confusable("model", model.name, existing)
            entry = await client.upsert_registered_model(
                RegisteredModel(name=model.name, owner=model.owner or None)
            )
        made = []
        for version, artifact in model.versions:
            if await _copy(client, target, model.name, str(entry.id), version, artifact):
                made.append(str(version.name))
        if model.served is not None and await find_served(model.name)(client) is None:
            main = await find_version(model.name, model.served.main)(client)
            await note_served(main, model.served, model.environment, model.runtime)(client)
        return made

    return with_registry(target, work)


async def _copy(
    client: Any, target: str, model: str, model_id: str, version: Any, artifact: Any
) -> bool:
    """Copy one version; returns whether it is new. Each part is written only if it is missing."""
    from model_registry.types import ModelArtifact, ModelVersion, ModelVersionState

    found = await find_model_version(client, model_id, version.name)
    known = found and await find_model_artifact(client, found.id, model)
    if known is not None and found is not None:
        if known.uri != artifact.uri:
            raise UserError(
                f"{target} has another {model} {version.name}: at {known.uri}, and here at "
                f"{artifact.uri}; rename or archive one of them"
            )
        return False
    if found is None:
        properties = storable(read_properties(version.custom_properties))
        fresh = ModelVersion(
            name=version.name,
            author=version.author,
            description=version.description,
            custom_properties=properties,
        )
        found = await client.register_version(fresh, model_id, artifact.uri)
    copied = artifact.model_dump(exclude={"id", "create_time_since_epoch", "state"})
    copied.pop("last_update_time_since_epoch", None)
    await client.upsert_model_version_artifact(ModelArtifact(**copied), found.id)
    if version.state == ModelVersionState.ARCHIVED:
        await archive(str(found.id))(client)
    return True
