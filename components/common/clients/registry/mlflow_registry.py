"""MLflow's model registry behind the same calls as the Kubeflow registry (see `interface`).

| here | in MLflow |
|---|---|
| registered model | registered model; its id is its name |
| version | model version, whose name is the tag `nudge.version`; its id is NAME/NUMBER |
| custom properties | the tag `nudge.properties`, as JSON; short ones also as tags of their own |
| artifact | the version's source, and the tag `nudge.artifact` |
| what is served | the model's tag `nudge.service`, and the alias `served` |

MLflow numbers versions and does not compare their tags, so two processes may create one name at the
same time: the version with the lower number stays.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import unquote

from nudge.components.common.clients.registry.values import TYPES, check_sendable
from nudge.components.common.core.errors import UserError

T = TypeVar("T")

VERSION, PROPERTIES, STATE, ARTIFACT, AUTHOR, SERVICE = (
    f"nudge.{name}" for name in ("version", "properties", "state", "artifact", "author", "service")
)
OWNER = "nudge.owner"
SERVED_ALIAS = "served"
LONGEST_TAG = 100_000
"""Characters of a tag's value (mlflow/utils/validation.py)."""
LONGEST_MIRRORED = 1000
"""Characters of a property that is also a tag of its own, for people who look at MLflow's pages."""
PAGE = 200


class MlflowRegistry:
    """An MLflow server as a `Registry`; ``client`` is an `mlflow.MlflowClient`."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @asynccontextmanager
    async def get_client(self) -> AsyncIterator["MlflowRegistry"]:
        """Itself: the entities of serving are further down in this class."""
        yield self

    async def close(self) -> None:
        """Nothing: the client keeps no connection."""

    # --- models

    async def get_registered_model_by_params(self, name: str) -> Any:
        found = await self._or_none(lambda: self._client.get_registered_model(name))
        return found and _model(found)

    async def get_registered_models(self, options: Any) -> list[Any]:
        options.next_page_token = ""
        return [_model(each) for each in await self._models()]

    async def upsert_registered_model(self, model: Any) -> Any:
        check_sendable({"name": model.name, "owner": model.owner or ""})
        tags = {OWNER: model.owner or ""}
        return _model(await self._create(self._client.create_registered_model, model.name, tags))

    # --- versions

    async def get_model_version_by_params(self, model_id: str, name: str) -> Any:
        return next((v for v in await self._versions(model_id) if v.name == name), None)

    async def get_model_versions(self, model_id: str, options: Any) -> list[Any]:
        options.next_page_token = ""
        return await self._versions(model_id)

    async def register_version(self, version: Any, model_id: str, uri: str) -> Any:
        properties = dict(version.custom_properties or {})
        check_sendable({"name": version.name, "uri": uri, "customProperties": properties})
        tags = {
            **_mirrored(properties),
            VERSION: version.name,
            STATE: "LIVE",
            AUTHOR: version.author or "",
            PROPERTIES: _stored(_typed(properties)),
        }
        made = await asyncio.to_thread(
            self._client.create_model_version,
            model_id, uri, tags=tags, description=version.description, await_creation_for=0,
        )  # fmt: skip
        first = await self.get_model_version_by_params(model_id, version.name)
        if first is not None and first.id != f"{model_id}/{made.version}":
            await asyncio.to_thread(self._client.delete_model_version, model_id, made.version)
            raise _conflict(f"{model_id} {version.name} is registered already")
        return _version(made)

    async def get_model_version(self, version_id: str) -> Any:
        import mr_openapi

        body = _version_json(await self._get(version_id))
        return mr_openapi.ModelVersion.model_construct(
            id=body["id"],
            name=body["name"],
            state=mr_openapi.ModelVersionState(body["state"]),
            custom_properties=_values(body["customProperties"]),
        )

    async def update_model_version(self, version_id: str, body: Any) -> Any:
        model, number = _split(version_id)
        values = body.to_dict()
        check_sendable(values)
        tags: dict[str, str] = {}
        if state := values.get("state"):
            tags[STATE] = str(getattr(state, "value", state))
        if (typed := values.get("customProperties")) is not None:
            before = (await self._get(version_id)).tags
            mirrored = _mirrored({name: _plain(each) for name, each in typed.items()})
            tags |= {name: text for name, text in mirrored.items() if before.get(name) != text}
            tags[PROPERTIES] = _stored(typed)  # last: it is what counts
        for name, text in tags.items():
            set_tag = self._client.set_model_version_tag
            await asyncio.to_thread(set_tag, model, number, name, text)
        return await self.get_model_version(version_id)

    async def get_model_version_artifacts(self, version_id: str, options: Any) -> list[Any]:
        from model_registry.types import ModelArtifact

        options.next_page_token = ""
        body = json.loads((await self._get(version_id)).tags.get(ARTIFACT, "null"))
        return [] if body is None else [ModelArtifact(**body)]

    async def upsert_model_version_artifact(self, artifact: Any, version_id: str) -> Any:
        model, number = _split(version_id)
        body = artifact.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        body |= {"id": version_id, "name": artifact.name, "uri": artifact.uri}
        check_sendable(body)
        set_tag = self._client.set_model_version_tag
        await asyncio.to_thread(set_tag, model, number, ARTIFACT, _stored(body))
        return artifact

    async def list_json(self, path: str) -> list[dict[str, Any]]:
        """Every item of ``/registered_models/ID/versions`` or ``/model_versions/ID/artifacts``."""
        _, kind, identity, _ = path.split("/")
        identity = unquote(identity)
        if kind == "registered_models":
            return [_version_json(each) for each in await self._raw_versions(identity)]
        body = json.loads((await self._get(identity)).tags.get(ARTIFACT, "null"))
        return [] if body is None else [{**body, "artifactType": "model-artifact"}]

    # --- what is served

    async def find_serving_environment(self, *, name: str) -> Any:
        """An environment is only a name here, so each one exists."""
        import mr_openapi

        return mr_openapi.ServingEnvironment.model_construct(name=name, id=name)

    async def get_serving_environments(self, *, page_size: str, next_page_token: str) -> Any:
        import mr_openapi

        services = await self._services()
        names = sorted({str(each.serving_environment_id) for each in services})
        make = mr_openapi.ServingEnvironment.model_construct
        items = [make(name=name, id=name) for name in names]
        return _page(mr_openapi.ServingEnvironmentList, items)

    async def create_serving_environment(self, body: Any) -> Any:
        return await self.find_serving_environment(name=body.name)

    async def get_inference_services(self, *, page_size: str, next_page_token: str) -> Any:
        import mr_openapi

        return _page(mr_openapi.InferenceServiceList, await self._services())

    async def create_inference_service(self, body: Any) -> Any:
        model = await asyncio.to_thread(self._client.get_registered_model, body.registered_model_id)
        if SERVICE in model.tags:
            raise _conflict(f"{model.name} has a record of what is served")
        values = {**body.to_dict(), "id": model.name}
        return await self._write_service(model.name, values)

    async def update_inference_service(self, service_id: str, body: Any) -> Any:
        model = await asyncio.to_thread(self._client.get_registered_model, service_id)
        values = json.loads(model.tags[SERVICE])
        changed = {key: each for key, each in body.to_dict().items() if each is not None}
        return await self._write_service(model.name, {**values, **changed})

    async def _write_service(self, model: str, values: dict[str, Any]) -> Any:
        check_sendable(values)
        set_tag = self._client.set_registered_model_tag
        await asyncio.to_thread(set_tag, model, SERVICE, _stored(values))
        _, number = _split(str(values["modelVersionId"]))
        alias = self._client.set_registered_model_alias
        await asyncio.to_thread(alias, model, SERVED_ALIAS, number)
        return _service(values)

    async def _services(self) -> list[Any]:
        return [
            _service(json.loads(model.tags[SERVICE]))
            for model in await self._models()
            if SERVICE in model.tags
        ]

    # --- MLflow's own calls

    async def _models(self) -> list[Any]:
        return await self._pages(self._client.search_registered_models, max_results=PAGE)

    async def _versions(self, model_id: str) -> list[Any]:
        return [_version(each) for each in await self._raw_versions(model_id)]

    async def _raw_versions(self, model_id: str) -> list[Any]:
        """A model's versions, oldest first; of those with the same name only the first."""
        quoted = model_id.replace("'", "''")
        search = self._client.search_model_versions
        found = await self._pages(search, filter_string=f"name='{quoted}'", max_results=PAGE)
        by_name: dict[str, Any] = {}
        for each in sorted(found, key=lambda version: int(version.version)):
            # One that was registered without nudge is named by its number.
            by_name.setdefault(each.tags.get(VERSION) or str(each.version), each)
        return list(by_name.values())

    async def _pages(self, search: Callable[..., Any], **filters: Any) -> list[Any]:
        items: list[Any] = []
        token = None
        while True:
            page = await asyncio.to_thread(search, **filters, page_token=token)
            items += page
            token = page.token
            if not token:
                return items

    async def _get(self, version_id: str) -> Any:
        return await asyncio.to_thread(self._client.get_model_version, *_split(version_id))

    async def _or_none(self, call: Callable[[], T]) -> T | None:
        from mlflow.exceptions import MlflowException

        try:
            return await asyncio.to_thread(call)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    async def _create(self, call: Callable[..., T], *arguments: Any) -> T:
        from mlflow.exceptions import MlflowException

        try:
            return await asyncio.to_thread(call, *arguments)
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":
                raise _conflict(str(error)) from None
            raise


def _conflict(why: str) -> Exception:
    from mr_openapi.exceptions import ConflictException

    return ConflictException(status=409, reason="Conflict", body=why)


def _split(version_id: str) -> tuple[str, str]:
    model, _, number = version_id.rpartition("/")
    return model, number


def _model(found: Any) -> Any:
    from model_registry.types import RegisteredModel

    return RegisteredModel(id=found.name, name=found.name, owner=found.tags.get(OWNER) or None)


def _version(found: Any) -> Any:
    from model_registry.types import ModelVersion

    body = _version_json(found)
    properties = {name: _plain(each) for name, each in body["customProperties"].items()}
    return ModelVersion(
        id=body["id"],
        name=body["name"],
        author=body["author"],
        description=found.description or None,
        registered_model_id=found.name,
        state=body["state"],
        create_time_since_epoch=body["createTimeSinceEpoch"],
        custom_properties=properties,
    )


def _version_json(found: Any) -> dict[str, Any]:
    """A version as the Kubeflow registry would send it."""
    return {
        "id": f"{found.name}/{found.version}",
        "name": found.tags.get(VERSION) or str(found.version),
        "author": found.tags.get(AUTHOR, ""),
        "description": found.description or "",
        "registeredModelId": found.name,
        "state": found.tags.get(STATE, "LIVE"),
        "createTimeSinceEpoch": str(found.creation_timestamp),
        "customProperties": json.loads(found.tags.get(PROPERTIES, "{}")),
    }


def _service(values: dict[str, Any]) -> Any:
    """A record of what is served, unvalidated: the ids here are not numbers."""
    import mr_openapi

    return mr_openapi.InferenceService.model_construct(
        id=values["id"],
        name=values.get("name"),
        runtime=values.get("runtime"),
        registered_model_id=values["registeredModelId"],
        model_version_id=values.get("modelVersionId"),
        serving_environment_id=values["servingEnvironmentId"],
        custom_properties=_values(values.get("customProperties") or {}),
    )


def _values(typed: dict[str, Any]) -> dict[str, Any]:
    import mr_openapi

    return {name: mr_openapi.MetadataValue.from_dict(each) for name, each in typed.items()}


def _typed(properties: dict[str, Any]) -> dict[str, Any]:
    """Plain properties in the registry's JSON form."""

    def typed(value: Any) -> dict[str, Any]:
        if isinstance(value, bool):
            return {"metadataType": "MetadataBoolValue", "bool_value": value}
        if isinstance(value, int):
            return {"metadataType": "MetadataIntValue", "int_value": str(value)}
        if isinstance(value, float):
            return {"metadataType": "MetadataDoubleValue", "double_value": value}
        return {"metadataType": "MetadataStringValue", "string_value": str(value)}

    return {name: typed(value) for name, value in properties.items()}


def _plain(typed: dict[str, Any]) -> Any:
    field, _ = TYPES[typed["metadataType"]]
    return int(typed[field]) if field == "int_value" else typed[field]


def _mirrored(properties: dict[str, Any]) -> dict[str, str]:
    """The properties that people see as tags; an empty or long one is only in `PROPERTIES`."""
    texts = {name: str(value) for name, value in properties.items()}
    return {
        name: text
        for name, text in texts.items()
        if 0 < len(text) <= LONGEST_MIRRORED and len(name) <= 250 and not name.startswith("nudge.")
    }


def _stored(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if len(text) > LONGEST_TAG:
        raise UserError(
            f"the entry has {len(text)} characters as JSON; MLflow's registry stores up to "
            f"{LONGEST_TAG} in one tag"
        )
    return text


def _page(kind: Any, items: list[Any]) -> Any:
    return kind.model_construct(next_page_token="", items=items)
