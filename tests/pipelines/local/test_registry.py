"""The registry through the unmodified client, over real HTTP."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nudge.components.common.local import processes
from nudge.pipelines.local import parts, services
from tests.local_registry import registry_headers, running_registry

warnings.simplefilter("ignore")


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    with running_registry(home) as address:
        yield address


@pytest.fixture
def registry(address: str) -> Any:
    from model_registry import ModelRegistry

    return ModelRegistry(address, author="test", is_secure=False)


def register(registry: Any, name: str, version: str, **metadata: Any) -> Any:
    return registry.register_model(
        name,
        f"s3://b/{name}/{version}",
        model_format_name="vLLM",
        model_format_version="1",
        version=version,
        metadata=metadata,
    )


def test_register_update_list_and_page(registry: Any) -> None:
    for number in range(7):
        register(registry, f"model-{number}", "v1", accuracy=number / 10, good=True, n=number)
    pager = registry.get_registered_models().page_size(3)
    assert [m.name for m in pager] == [f"model-{n}" for n in range(7)]
    version = registry.get_model_version("model-3", "v1")
    assert version.custom_properties == {"accuracy": 0.3, "good": True, "n": 3}
    version.description = "changed"
    registry.update(version)
    assert registry.get_model_version("model-3", "v1").description == "changed"
    assert registry.get_model_artifact("model-3", "v1").uri == "s3://b/model-3/v1"
    with pytest.raises(Exception, match="already exists"):
        register(registry, "model-3", "v1")


def test_a_restart_keeps_everything(registry: Any, home: Path) -> None:
    register(registry, "kept", "v1")
    processes.stop(home, services.REGISTRY)
    from model_registry import ModelRegistry

    address = parts.start_registry(home, 0).address
    fresh = ModelRegistry(address, author="test", is_secure=False)
    assert fresh.get_model_version("kept", "v1").name == "v1"


@pytest.mark.parametrize("prefix", ["v1alpha3", "v1"])
def test_both_api_versions_are_served_without_filter_queries(address: str, prefix: str) -> None:
    url = f"{address}/api/model_registry/{prefix}/registered_models"
    headers = registry_headers()
    assert httpx.post(url, json={"name": "a"}, headers=headers).status_code == 201
    assert [item["name"] for item in httpx.get(url, headers=headers).json()["items"]] == ["a"]
    answer = httpx.get(url, params={"filterQuery": "name = 'a'"}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "Bad Request")
    for gone in ("experiments", "experiment_runs", "inference_services/1/serves"):
        missing = httpx.get(url.replace("registered_models", gone), headers=headers)
        assert missing.text == "404 page not found\n"


def test_bad_requests_are_refused(address: str) -> None:
    url = f"{address}/api/model_registry/v1alpha3/registered_models"
    assert httpx.post(url, json={"name": "m"}, headers=registry_headers()).status_code == 201
    assert httpx.post(url, json={"name": "m"}, headers=registry_headers()).status_code == 409
    unknown = httpx.post(url, json={"name": "x", "colour": 1}, headers=registry_headers())
    assert (unknown.status_code, unknown.json()["message"]) == (400, 'json: unknown field "colour"')
    headers = registry_headers()
    assert httpx.post(url, json={"name": "n" * 256}, headers=headers).status_code == 500
    assert httpx.post(url, json={}, headers=headers).status_code == 422
    as_json = {**headers, "Content-Type": "application/json"}
    assert httpx.post(url, content=b"{", headers=as_json).status_code == 400
    assert httpx.get(f"{url}/99", headers=headers).status_code == 404
    assert httpx.get(url, params={"pageSize": "none"}, headers=headers).status_code == 400
