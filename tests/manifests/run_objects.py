"""The jobs and servers that a run creates on a cluster."""

from typing import Any

from nudge.components.common.clients.registry.releases import Version
from nudge.components.deploy.kserve import objects as kserve
from nudge.components.deploy.settings import DeploySettings, KServeSettings
from nudge.components.train.cluster.jobs import Step
from nudge.components.train.settings import LaunchSettings
from tests.kubernetes_schemas import definition, schema, with_defaults

Object = dict[str, Any]


def job(engine: Any, settings: LaunchSettings) -> Object:
    found = definition({"apiVersion": engine.KIND.api_version, "kind": engine.KIND.name})
    assert found
    body = engine.body(
        settings, name="n", handover="s3://b/k", schema=schema(found),
        step=Step("i", variables={"HF_HUB_OFFLINE": "1"}, trusted={"configMap": {"name": "ca"}}),
    )  # fmt: skip
    return dict(with_defaults(body, schema(found)))  # a policy sees the object with its defaults


def served(uri: str = "s3://b/models/m/v1", **more: Any) -> Object:
    version = Version(
        model="m", name="v1", model_id="1", id="2", uri=uri, archived=False, created_ms=0,
        properties={},
    )  # fmt: skip
    settings = DeploySettings(
        target="kserve", uploads="s3://b/models" if uri.startswith("s3") else "oci://r.io/models",
        kserve=KServeSettings(connection="nudge-data-connection", **more),
    )  # fmt: skip
    return kserve.inference_service(version, settings)
