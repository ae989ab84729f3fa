"""A model's versions in the Model Registry, and which of them are served.

Each function returns work for `with_registry`. One InferenceService entity per model records what
is served: its custom properties hold the endpoint, each version's share of the traffic, and the
versions that had all of it before, which is what a rollback needs.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from nudge.components.common.clients.registry.lookup import (
    find_environment,
    find_model,
    find_model_artifact,
    find_model_version,
    list_model_versions,
    pages,
    together,
)
from nudge.components.common.clients.registry.values import properties_of, read_properties
from nudge.components.common.core.errors import UserError, nearest

KEPT_HISTORY = 20
"""How many versions that had all the traffic are remembered."""
NOT_PROMOTED = "not_promoted"
"""The custom property with the reason why a version got no traffic; empty if it got some."""

Work = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True)
class Version:
    """A registered version; ``properties`` are its custom properties."""

    model: str
    name: str
    model_id: str
    id: str
    uri: str
    archived: bool
    created_ms: int
    properties: dict[str, Any]


@dataclass(frozen=True)
class Served:
    """What a model's endpoint serves; ``shares`` is percent by version and adds up to 100."""

    model: str
    endpoint: str
    shares: dict[str, int]
    history: tuple[str, ...] = field(default=())
    """Versions that had all the traffic, oldest first; the last may be the one served now."""
    withdrawn: tuple[str, ...] = field(default=())
    """Versions whose traffic a rollback, a split or the promotion of an older one withdrew."""
    canary: str = ""
    """The candidate whose canary moved the traffic last; empty after any other move."""

    @property
    def main(self) -> str:
        """The version with the largest share."""
        return max(self.shares, key=lambda version: self.shares[version])

    @property
    def before(self) -> str | None:
        """The version that had all the traffic before the main one."""
        return next((version for version in reversed(self.history) if version != self.main), None)

    @property
    def needed(self) -> set[str]:
        """The versions that are served, and the one that a rollback returns to."""
        return {*self.shares, *([self.before] if self.before else [])}


def find_version(model: str, version: str) -> Callable[[Any], Awaitable[Version]]:
    """Work that returns a `Version`; raises `UserError` that suggests existing ones."""

    async def work(client: Any) -> Version:
        entry = await model_entity(client, model)
        found = await find_model_version(client, entry.id, version)
        if found is None:
            versions = await list_model_versions(client, entry.id)
            hint = nearest(version, [other.name for other in versions])
            raise UserError(f"the registry has no version {version!r} of {model}; {hint}")
        complete = await _version(client, model, entry, found)
        if complete is None:
            raise UserError(f"{model} {version} has no artifact in the registry; register it again")
        return complete

    return work


def list_versions(model: str) -> Callable[[Any], Awaitable[list[Version]]]:
    """Work that returns every `Version` of a model that has an artifact, oldest first."""

    async def work(client: Any) -> list[Version]:
        entry = await model_entity(client, model)
        found = await client.list_json(f"/registered_models/{entry.id}/versions")
        versions = await together(_listed(client, model, entry, version) for version in found)
        return [version for version in versions if version]

    return work


def archive_older(model: str, keep: int) -> Callable[[Any], Awaitable[list[str]]]:
    """Work that archives every version older than the newest ``keep``; returns their names.

    Served versions, and the one that a rollback returns to, stay LIVE whatever their age.
    """

    async def work(client: Any) -> list[str]:
        served = await find_served(model)(client)
        needed = served.needed if served else set()
        live = [each for each in await list_versions(model)(client) if not each.archived]
        live.sort(key=lambda each: each.created_ms)
        old = [each for each in live[: max(0, len(live) - keep)] if each.name not in needed]
        for each in old:
            await archive(each.id)(client)
        return [each.name for each in old]

    return work


def archive(version_id: str) -> Work:
    """Work that archives a version."""

    async def work(client: Any) -> None:
        import mr_openapi

        archived = mr_openapi.ModelVersionUpdate(state=mr_openapi.ModelVersionState.ARCHIVED)
        async with client.get_client() as api:
            await api.update_model_version(version_id, archived)

    return work


def unneeded(model: str) -> Callable[[Any], Awaitable[list[Version]]]:
    """Work that returns the archived versions that neither the traffic nor a rollback needs."""

    async def work(client: Any) -> list[Version]:
        served = await find_served(model)(client)
        needed = served.needed if served else set()
        versions = await list_versions(model)(client)
        return [each for each in versions if each.archived and each.name not in needed]

    return work


def find_served(model: str) -> Callable[[Any], Awaitable[Served | None]]:
    """Work that returns what is `Served` of a model, or None if nothing is."""

    async def work(client: Any) -> Served | None:
        entry = await find_model(client, model)
        service = entry and await service_entity(client, model, str(entry.id))
        return _read(model, service) if service else None

    return work


def find_standing(
    model: str, run_id: str
) -> Callable[[Any], Awaitable[tuple[Served, Version | None] | None]]:
    """Work that returns what is `Served` and the `Version` to compare a run with; None if nothing
    is served.

    That is the main version. For a run that was interrupted after its own version was served and
    then resumed, it is the version before that, or None if its own was the first.
    """

    async def work(client: Any) -> tuple[Served, Version | None] | None:
        served = await find_served(model)(client)
        if served is None:
            return None
        main = await find_version(model, served.main)(client)
        if not run_id or main.properties.get("run_id") != run_id:
            return served, main
        return served, await find_version(model, served.before)(client) if served.before else None

    return work


def note_served(version: Version, served: Served, environment: str, runtime: str) -> Work:
    """Work that records what is served, with ``version`` as the entity's own version."""

    async def work(client: Any) -> None:
        import mr_openapi
        from mr_openapi.exceptions import ConflictException

        properties = _properties(served)

        async def update() -> bool:
            service = await service_entity(client, served.model, version.model_id)
            if service is None:
                return False
            # An update replaces all properties, so keep those of others.
            change = mr_openapi.InferenceServiceUpdate(
                modelVersionId=version.id,
                desiredState="DEPLOYED",
                customProperties={**(service.custom_properties or {}), **properties},
            )
            async with client.get_client() as api:
                await api.update_inference_service(service.id, change)
            return True

        if await update():
            return
        environment_id = await _environment(client, environment)
        fresh = mr_openapi.InferenceServiceCreate(
            name=served.model,
            runtime=runtime,
            registeredModelId=version.model_id,
            modelVersionId=version.id,
            servingEnvironmentId=environment_id,
            desiredState="DEPLOYED",
            customProperties=properties,
        )
        try:
            async with client.get_client() as api:
                await api.create_inference_service(fresh)
        except ConflictException:
            # Another process was first, or the name belongs to a service that is not nudge's.
            if not await update():
                raise UserError(
                    f"the registry already has a service {served.model!r} in the serving "
                    f"environment {environment!r} that nudge did not write; rename that service"
                ) from None

    return work


def note_promotion(version: Version, reason: str) -> Work:
    """Work that records why a version was not promoted; an empty ``reason`` means that it was."""

    return note_properties(version.id, {"promoted": not reason, NOT_PROMOTED: reason})


def note_properties(version_id: str, values: Mapping[str, str | bool]) -> Work:
    """Work that sets custom properties of a version and keeps its others."""

    async def work(client: Any) -> None:
        import mr_openapi

        def property(value: str | bool) -> Any:
            if isinstance(value, bool):
                kind = "MetadataBoolValue"
                plain = mr_openapi.MetadataBoolValue(bool_value=value, metadataType=kind)
                return mr_openapi.MetadataValue(plain)
            return text_value(value)

        async with client.get_client() as api:
            found = await api.get_model_version(version_id)
            # An update replaces all properties, so keep the others.
            changed = {name: property(value) for name, value in values.items()}
            properties = {**(found.custom_properties or {}), **changed}
            change = mr_openapi.ModelVersionUpdate(customProperties=properties)
            await api.update_model_version(version_id, change)

    return work


async def _environment(client: Any, name: str) -> str:
    """The id of the serving environment of exactly this name; creates it if necessary."""
    import mr_openapi
    from mr_openapi.exceptions import ConflictException

    found = await find_environment(client, name)
    if found is None:
        try:
            async with client.get_client() as api:
                found = await api.create_serving_environment(
                    mr_openapi.ServingEnvironmentCreate(name=name)
                )
        except ConflictException:
            found = await find_environment(client, name)
    if found is None:
        raise UserError(
            f"the registry confuses the serving environment {name!r} with an existing one; use "
            "another namespace"
        )
    return str(found.id)


async def model_entity(client: Any, model: str) -> Any:
    entry = await find_model(client, model)
    if entry is None:
        raise UserError(
            f"the registry has no model {model!r}; a run that promotes a version registers it"
        )
    return entry


async def _version(client: Any, model: str, entry: Any, found: Any) -> Version | None:
    """None if it has no artifact, because its registration was interrupted."""
    artifact = await find_model_artifact(client, found.id, model)
    if artifact is None:
        return None
    return Version(
        model=model,
        name=found.name,
        model_id=str(entry.id),
        id=str(found.id),
        uri=str(artifact.uri),
        archived=found.state is not None and found.state.value == "ARCHIVED",
        created_ms=int(found.create_time_since_epoch or 0),
        properties=read_properties(found.custom_properties),
    )


async def _listed(client: Any, model: str, entry: Any, found: dict[str, Any]) -> Version | None:
    """As `_version`, from the registry's JSON."""
    path = f"/model_versions/{quote(str(found['id']), safe='')}/artifacts"
    artifacts = await client.list_json(path)
    models = [each for each in artifacts if each.get("artifactType") == "model-artifact"]
    named = [each for each in models if each.get("name") == model]
    chosen = named or (models if len(models) == 1 else [])
    if not chosen:
        return None
    return Version(
        model=model,
        name=str(found["name"]),
        model_id=str(entry.id),
        id=str(found["id"]),
        uri=str(chosen[0].get("uri")),
        archived=found.get("state") == "ARCHIVED",
        created_ms=int(found.get("createTimeSinceEpoch") or 0),
        properties=properties_of(found),
    )


async def service_entity(client: Any, model: str, model_id: str) -> Any:
    """The model's InferenceService entity that nudge wrote, or None."""
    async with client.get_client() as api:
        for service in await pages(api.get_inference_services):
            ours = "shares" in (service.custom_properties or {})
            if ours and service.name == model and service.registered_model_id == model_id:
                return service
    return None


def _read(model: str, service: Any) -> Served:
    def text(name: str) -> str:
        return str(service.custom_properties[name].actual_instance.string_value)

    shares = {str(name): int(share) for name, share in json.loads(text("shares")).items()}
    # An older nudge recorded no withdrawn versions.
    withdrawn = text("withdrawn") if "withdrawn" in service.custom_properties else "[]"
    return Served(
        model,
        text("endpoint"),
        shares,
        tuple(json.loads(text("history"))),
        tuple(json.loads(withdrawn)),
        text("canary") if "canary" in service.custom_properties else "",
    )


def _properties(served: Served) -> dict[str, Any]:
    values = {
        "endpoint": served.endpoint,
        "shares": json.dumps(served.shares),
        "history": json.dumps(served.history[-KEPT_HISTORY:]),
        "withdrawn": json.dumps(served.withdrawn[-KEPT_HISTORY:]),
        "canary": served.canary,
    }
    return {name: text_value(value) for name, value in values.items()}


def text_value(value: str) -> Any:
    import mr_openapi

    return mr_openapi.MetadataValue(
        mr_openapi.MetadataStringValue(string_value=value, metadataType="MetadataStringValue")
    )
