"""Bodies of requests, checked as the Model Registry's Go server does: same status, same order.

The client's models check fields and their types. This module checks what only the server does:
properties, required fields and ids.
"""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mr_openapi as api
import pydantic

READ_ONLY = ("id", "createTimeSinceEpoch", "lastUpdateTimeSinceEpoch")
INT32 = range(-(2**31), 2**31)


class BadBody(Exception):
    """An invalid body; the response has this ``status``."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class EntityKind:
    """A kind of entity: its paths, its models, and the field that names its parent."""

    name: str
    plural: str
    create: type[Any]
    update: type[Any]
    required: tuple[str, ...] = ()
    parent_field: str = ""
    ids: tuple[str, ...] = ()
    state: str = "state"
    """The field that an update resets unless it sets it."""

    @property
    def title(self) -> str:
        """The kind in the server's messages."""
        return self.name.replace("_", " ")


REGISTERED_MODEL = EntityKind(
    "registered_model",
    "registered_models",
    api.RegisteredModelCreate,
    api.RegisteredModelUpdate,
    required=("name",),
)
MODEL_VERSION = EntityKind(
    "model_version",
    "model_versions",
    api.ModelVersionCreate,
    api.ModelVersionUpdate,
    required=("registeredModelId", "name"),
    parent_field="registeredModelId",
    ids=("registeredModelId",),
)
SERVING_ENVIRONMENT = EntityKind(
    "serving_environment",
    "serving_environments",
    api.ServingEnvironmentCreate,
    api.ServingEnvironmentUpdate,
    required=("name",),
    state="",
)
INFERENCE_SERVICE = EntityKind(
    "inference_service",
    "inference_services",
    api.InferenceServiceCreate,
    api.InferenceServiceUpdate,
    required=("registeredModelId", "servingEnvironmentId"),
    parent_field="servingEnvironmentId",
    ids=("registeredModelId", "servingEnvironmentId", "modelVersionId"),
    state="desiredState",
)
KINDS = (REGISTERED_MODEL, MODEL_VERSION, SERVING_ENVIRONMENT, INFERENCE_SERVICE)

ARTIFACTS: dict[str, tuple[type[Any], type[Any]]] = {
    "model-artifact": (api.ModelArtifact, api.ModelArtifactUpdate),
    "doc-artifact": (api.DocArtifact, api.DocArtifactUpdate),
    "dataset-artifact": (api.DataSet, api.DataSetUpdate),
    "metric": (api.Metric, api.MetricUpdate),
    "parameter": (api.Parameter, api.ParameterUpdate),
}
ARTIFACT_KINDS = tuple(ARTIFACTS)


def decode(raw: bytes) -> Any:
    """The first JSON value of a body. Anything after it is ignored, as by Go's decoder."""

    def refuse(constant: str) -> Any:
        raise BadBody(f"invalid character '{constant[0]}' looking for beginning of value")

    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise BadBody("the body is not valid UTF-8") from None
    text = text.lstrip(" \t\r\n")
    if not text:
        raise BadBody("EOF")
    try:
        value, _ = json.JSONDecoder(parse_constant=refuse).raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise BadBody(f"invalid JSON: {error}") from None
    if _any_text(value, lambda each: "\0" in each):
        raise BadBody("Request body contains null bytes which are not allowed")
    if _any_text(value, lambda each: re.search("[\ud800-\udfff]", each) is not None):
        raise BadBody("the body contains half a surrogate pair")
    return value


def created(kind: EntityKind, data: Any) -> dict[str, Any]:
    """The body of a create, with the server's defaults; raises `BadBody`."""
    sent = _fields(kind.create, data)
    types = {key: value for key, value in sent.items() if value not in (None, "")}
    # The server checks types before required fields, so give the models a value for those.
    body = _typed(kind.create, {**dict.fromkeys(kind.required, "1"), **types}) | {
        key: value for key, value in sent.items() if value == ""
    }
    for field in kind.required:
        if not sent.get(field):
            raise BadBody(f"required field '{field}' is zero value.", 422)
    for field in kind.ids:
        if sent.get(field):
            parse_id(sent[field], "error setting field Properties")
    return body


def updated(kind: EntityKind, data: Any) -> dict[str, Any]:
    """The changes of an update; raises `BadBody`. An update without a state sets the default."""
    sent = {key: value for key, value in _fields(kind.update, data).items() if value is not None}
    body = _typed(kind.update, sent)
    return {key: value for key, value in body.items() if key in sent or key == kind.state}


def artifact(data: Any, types: tuple[str, ...], *, update: bool = False) -> dict[str, Any]:
    """The body of an artifact, which must be one of ``types``; raises `BadBody`."""
    if not isinstance(data, dict):
        raise BadBody("json: cannot unmarshal the body into Go value of type openapi.Artifact")
    if len(types) == 1:
        data = {"artifactType": types[0], **data}
    kind = data.get("artifactType")
    if kind not in types:
        raise BadBody(
            "invalid artifact type, must be either ModelArtifact, DocArtifact, DataSet, Metric, or "
            "Parameter: bad request"
        )
    model = ARTIFACTS[str(kind)][1 if update else 0]
    sent = {
        key: value
        for key, value in _fields(model, data, READ_ONLY).items()
        if value is not None and key not in READ_ONLY
    }
    return {key: value for key, value in _typed(model, sent).items() if key in sent}


def parse_id(text: Any, what: str) -> int:
    """An id as the server parses one (int32); raises `BadBody`."""
    if not re.fullmatch(r"-?[0-9]+", str(text), re.ASCII):
        raise BadBody(f'{what}: strconv.ParseInt: parsing "{text}": invalid syntax: bad request')
    if len(str(text)) > 20 or int(text) not in INT32:
        raise BadBody(
            f'{what}: strconv.ParseInt: parsing "{text}": value out of range: bad request'
        )
    return int(text)


def _fields(model: type[Any], data: Any, allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(data, dict):
        kind = {list: "array", str: "string", bool: "bool"}.get(type(data), "number")
        raise BadBody(
            f"json: cannot unmarshal {kind} into Go value of type openapi.{model.__name__}"
        )
    aliases = {field.alias or name for name, field in model.model_fields.items()}
    for key in data:
        if key not in aliases and key not in allowed:
            raise BadBody(f'json: unknown field "{key}"')
    return data


def _typed(model: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in values.items() if key != "customProperties"}
    try:
        made = model.from_dict(plain)
        assert made is not None
        body = dict(made.to_dict())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise BadBody(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadBody(f"invalid body: {error}") from None
    if values.get("customProperties") is not None:
        body["customProperties"] = properties(values["customProperties"])
    return body


def properties(sent: Any) -> dict[str, Any]:
    """Custom properties as the server stores them; raises `BadBody`."""
    if not isinstance(sent, dict):
        raise BadBody("json: cannot unmarshal into Go field customProperties of type map")
    return {key: _property(key, value) for key, value in sent.items()}


def _property(key: str, sent: Any) -> dict[str, Any]:
    if not isinstance(sent, dict):
        raise BadBody("failed to unmarshal JSON into map for the discriminator lookup")
    kind = sent.get("metadataType")
    fields: dict[str, tuple[str, type | tuple[type, ...], Any]] = {
        "MetadataStringValue": ("string_value", str, ""),
        "MetadataIntValue": ("int_value", str, ""),
        "MetadataDoubleValue": ("double_value", (int, float), 0),
        "MetadataBoolValue": ("bool_value", bool, False),
        "MetadataStructValue": ("struct_value", str, ""),
    }
    if not isinstance(kind, str) or kind not in fields:
        raise BadBody(
            f"error setting field CustomProperties: bad request: metadataType not found for {key}"
        )
    field, types, zero = fields[kind]
    value = sent.get(field)
    value = zero if value is None else value
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise BadBody(f"failed to unmarshal MetadataValue as {kind}: wrong type of {field}")
    if kind == "MetadataIntValue":
        value = str(_integer(key, str(value)))
    elif kind == "MetadataStructValue":
        value = _struct(key, str(value))
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**1023:
        raise BadBody(f"failed to unmarshal MetadataValue as {kind}: out of range")
    return {field: value, "metadataType": kind}


def _integer(key: str, text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text, re.ASCII) or int(text) not in INT32:
        raise BadBody(
            "error setting field CustomProperties: bad request: unable to decode as int64 invalid "
            f'numeric string: strconv.ParseInt: parsing "{text}" for key {key}'
        )
    return int(text)


def _struct(key: str, text: str) -> str:
    try:
        return json.dumps(json.loads(base64.b64decode(text, validate=True)), separators=(",", ":"))
    except ValueError:
        raise BadBody(
            "error setting field CustomProperties: bad request: unable to decode base64 data for "
            f"key {key}"
        ) from None


def _any_text(value: Any, wanted: Callable[[str], bool]) -> bool:
    if isinstance(value, str):
        return wanted(value)
    if isinstance(value, dict):
        return any(wanted(key) or _any_text(each, wanted) for key, each in value.items())
    return isinstance(value, list) and any(_any_text(each, wanted) for each in value)
