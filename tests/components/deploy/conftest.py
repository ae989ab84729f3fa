"""Fixtures: a small OpenShift with a registry, and a model with versions in it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nudge.components.deploy.local import gateway
from nudge.components.deploy.local.local_serving import LocalServing
from nudge.components.deploy.settings import DeploySettings
from nudge.pipelines.local import services
from tests.components.deploy.kserve_cluster import (
    EXPECTED,
    PROMPT,
    QUICK,
    SETTINGS,
    VERSIONS,
    ServingCluster,
)
from tests.components.deploy.local_promote import quick_server
from tests.components.deploy.site import Site
from tests.local_registry import running_registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("registry")
    with running_registry(home) as address:
        yield address


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in QUICK.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def cluster(
    tmp_path: Path, registry: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServingCluster]:
    with ServingCluster(tmp_path) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.api.kubeconfig(tmp_path)))
        monkeypatch.setenv("NUDGE_REGISTRY_URL", registry)
        monkeypatch.setenv("AWS_S3_BUCKET", "bucket")
        monkeypatch.setenv("NUDGE_SERVING_CA", str(cluster.router.authority))
        yield cluster


@pytest.fixture
def model(registry: str, request: pytest.FixtureRequest) -> str:
    """A registered model for this test alone."""
    from model_registry import ModelRegistry

    name = request.node.name.replace("_", "-").replace("[", "-").replace("]", "")[5:]
    client = ModelRegistry(registry, author="test", is_secure=False)
    for version in VERSIONS:
        client.register_model(
            name, f"s3://bucket/models/{name}/{version}", version=version,
            model_format_name="vLLM", model_format_version="1",
            metadata={"expected_next": json.dumps(EXPECTED)},
        )  # fmt: skip
    return name


@pytest.fixture
def site(
    request: pytest.FixtureRequest,
    home: Path,
    registry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    model = request.node.name.replace("_", "-").replace("[", "-").replace("]", "")[5:]
    monkeypatch.setenv("NUDGE_REGISTRY_URL", registry)
    monkeypatch.setenv("AWS_S3_BUCKET", "bucket")
    if request.param == "kserve":
        cluster = request.getfixturevalue("cluster")
        yield Site(model, registry, SETTINGS, EXPECTED, cluster.weights)
        return
    monkeypatch.setattr(LocalServing, "_fetch", lambda self, version: tmp_path)
    monkeypatch.setattr(LocalServing, "_serve", quick_server)

    def weights() -> dict[str, int]:
        route = gateway.routes(home).get(model)
        return route.shares if route else {}

    yield Site(model, registry, DeploySettings(smoke_prompt=PROMPT), [], weights)
    services.down(home)
