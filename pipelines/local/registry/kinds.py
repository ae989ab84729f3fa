"""The kinds of entities, and the client's own models that their bodies are checked with."""

from dataclasses import dataclass
from typing import Any

import mr_openapi as api
import pydantic

NAME_LIMIT = 255
READ_ONLY = ("id", "createTimeSinceEpoch", "lastUpdateTimeSinceEpoch")


class BadBody(Exception):
    """A body that cannot be taken; ``missing`` if a required field is not there."""

    def __init__(self, message: str, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True)
class Kind:
    """A kind of entity: its paths, its models, and the kind and field of its parent."""

    name: str
    plural: str
    create: type[Any]
    update: type[Any]
    parent: str = ""
    parent_field: str = ""


KINDS = {
    kind.plural: kind
    for kind in (
        Kind(
            "registered_model",
            "registered_models",
            api.RegisteredModelCreate,
            api.RegisteredModelUpdate,
        ),
        Kind(
            "model_version",
            "model_versions",
            api.ModelVersionCreate,
            api.ModelVersionUpdate,
            "registered_models",
            "registeredModelId",
        ),
        Kind(
            "serving_environment",
            "serving_environments",
            api.ServingEnvironmentCreate,
            api.ServingEnvironmentUpdate,
        ),
        Kind(
            "inference_service",
            "inference_services",
            api.InferenceServiceCreate,
            api.InferenceServiceUpdate,
            "serving_environments",
            "servingEnvironmentId",
        ),
        Kind("experiment", "experiments", api.ExperimentCreate, api.ExperimentUpdate),
        Kind(
            "experiment_run",
            "experiment_runs",
            api.ExperimentRunCreate,
            api.ExperimentRunUpdate,
            "experiments",
            "experimentId",
        ),
    )
}
ARTIFACTS: dict[str, tuple[type[Any], type[Any]]] = {
    "model-artifact": (api.ModelArtifact, api.ModelArtifactUpdate),
    "doc-artifact": (api.DocArtifact, api.DocArtifactUpdate),
    "dataset-artifact": (api.DataSet, api.DataSetUpdate),
    "metric": (api.Metric, api.MetricUpdate),
    "parameter": (api.Parameter, api.ParameterUpdate),
}
ARTIFACT_KINDS = tuple(ARTIFACTS)


def checked(model: type[Any], data: Any, *, partial: bool = False) -> dict[str, Any]:
    """A body as plain JSON values, checked by a model; only the fields given if ``partial``.

    Raises `BadBody` as the server does: unknown fields, wrong types, names that are too long.
    """
    if not isinstance(data, dict):
        raise BadBody(f"json: cannot unmarshal {type(data).__name__} into an object")
    aliases = {field.alias or name for name, field in model.model_fields.items()}
    for key in data:
        if key not in aliases and key not in READ_ONLY:
            raise BadBody(f'json: unknown field "{key}"')
    given = {
        key: value for key, value in data.items() if key not in READ_ONLY and value is not None
    }
    try:
        made = model.from_dict(given)
        assert made is not None
        body = dict(made.to_dict())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        missing = first["type"] == "missing"
        raise BadBody(f"{where}: {first['msg']}", missing) from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadBody(f"invalid body: {error}") from None
    for key in ("name", "externalId"):
        if len(body.get(key) or "") > NAME_LIMIT:
            raise BadBody(f"{key} is longer than {NAME_LIMIT} characters")
    if body.get("name") == "" or ("name" in body and "\0" in body["name"]):
        raise BadBody("name must not be empty or hold NUL")
    return {key: value for key, value in body.items() if not partial or key in given}


def artifact_models(data: Any) -> tuple[str, type[Any], type[Any]]:
    """The artifact type of a body with its models; raises `BadBody` if it is none."""
    kind = data.get("artifactType") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in ARTIFACTS:
        raise BadBody(f"artifactType {kind!r}: expected one of {', '.join(ARTIFACTS)}")
    return kind, *ARTIFACTS[kind]
