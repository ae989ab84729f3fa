"""The objects that nudge creates for KServe: their schema, names and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.deploy.kserve import objects, routes
from nudge.components.deploy.settings import DeploySettings
from tests.components.deploy.kserve_cluster import SETTINGS
from tests.kubernetes_schemas import problems


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_S3_BUCKET", "b")


def version(model: str = "m", name: str = "v1", uri: str = "s3://b/models/m/v1") -> Version:
    return Version(model, name, "1", "2", uri, False, 0, {})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"authentication": False, "gpus": 0, "arguments": ["--max-model-len=4096"]},
        {
            "gpu_type": "amd.com/gpu",
            "gpus": 2,
            "replicas": 3,
            "node_selector": {"zone": "a"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        {"hardware_profile": "redhat-ods-applications/gpu"},
        {"queue": "gpus"},
    ],
)
def test_the_cluster_accepts_the_objects(values: dict[str, Any]) -> None:
    settings = parse(DeploySettings, {"kserve": {"connection": "models", **values}}, "deploy")
    made = objects.inference_service(version(), settings)
    assert problems(made) == []
    predictor = made["spec"]["predictor"]
    assert predictor["model"]["storage"] == {
        "key": "models",
        "path": "models/m/v1/",
        "parameters": {"bucket": "b"},
    }
    annotations = made["metadata"]["annotations"]
    assert annotations["opendatahub.io/connections"] == "models"
    assert annotations["serving.kserve.io/deploymentMode"] == "RawDeployment"
    labels = made["metadata"]["labels"]
    assert labels["opendatahub.io/dashboard"] == "true"
    assert labels["modelregistry.opendatahub.io/model-version-id"] == "2"
    assert labels.get("kueue.x-k8s.io/queue-name") == values.get("queue")
    assert ("resources" in predictor["model"]) == ("hardware_profile" not in values)
    if values.get("gpus") == 2:
        assert predictor["model"]["resources"]["limits"]["amd.com/gpu"] == "2"
        assert predictor["tolerations"][0]["key"] == "gpu"
    openshift = routes.OpenShiftRoute(settings.kserve)
    route = openshift.body("m", {"v1": 90, "v2": 10})
    assert problems(route) == []
    assert list(openshift.weights(route).values()) == [90, 10]
    authenticated = values.get("authentication", True)
    assert route["spec"]["tls"]["termination"] == ("reencrypt" if authenticated else "edge")


def test_an_image_is_served_from_its_registry() -> None:
    values = {"connection": "", "pull_secret": "quay"}
    uploads: dict[str, Any] = {"uploads": "oci://quay.io/team"}
    uri = f"oci://quay.io/team/m@sha256:{'0' * 64}"
    made = objects.inference_service(
        version(uri=uri), parse(DeploySettings, {"kserve": values, **uploads}, "deploy")
    )
    assert problems(made) == []
    predictor = made["spec"]["predictor"]
    assert predictor["model"]["storageUri"] == uri
    assert predictor["imagePullSecrets"] == [{"name": "quay"}]
    assert "opendatahub.io/connections" not in made["metadata"]["annotations"]
    public = objects.inference_service(version(uri=uri), replace(SETTINGS, **uploads))
    assert "imagePullSecrets" not in public["spec"]["predictor"]


@pytest.mark.parametrize("model_name", ["m", "Support Model", "x" * 80, "7b", "--", "a.b", "日本"])
def test_object_names_are_valid_and_unique(model_name: str) -> None:
    from re import fullmatch

    names = [
        objects.service_name(model_name, each) for each in ("v1", "v1.0", "v1-0", "V1", "r" * 70)
    ]
    assert len(set(names)) == 5
    for name in [*names, objects.endpoint_name(model_name)]:
        assert fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
        assert len(name) <= 48
    assert objects.endpoint_name("a.b") != objects.endpoint_name("a-b")


def test_unservable_versions_and_splits_are_refused() -> None:
    with pytest.raises(UserError, match="deploy.kserve.connection"):
        objects.inference_service(
            version(), parse(DeploySettings, {"kserve": {"connection": ""}}, "deploy")
        )
    with pytest.raises(UserError, match="cannot serve m v1 from file:///x"):
        objects.inference_service(version(uri="file:///x"), SETTINGS)
    with pytest.raises(UserError, match="at most 4"):
        routes.OpenShiftRoute(SETTINGS.kserve).body("m", dict.fromkeys("abcde", 20))
