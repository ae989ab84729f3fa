"""The registry against its API's own descriptions, by schemathesis, over real HTTP.

model-registry.yaml (v1alpha3) and model-registry-v1.yaml are the Kubeflow Model Registry's (Apache
2.0), unchanged.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
import yaml
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.local_registry import registry_headers, running_registry

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
NOT_SERVED = re.compile(
    r"/experiment|/serves$|/inference_services/[^/]+/(model|version)$"
    r"|/serving_environments/[^/]+/inference_services$"
)
"""What neither nudge nor the registry's client uses."""
PREFIX = "/api/model_registry/v1alpha3"


def described(name: str) -> dict[str, Any]:
    """The API's description, with two additions that make it match the real server.

    A discriminator distinguishes its artifacts, which JSON Schema's oneOf does not know; and its
    lists take a page size, a filter and a page token as any string but document no 400.
    """
    text = (Path(__file__).parent / name).read_text()
    found: dict[str, Any] = yaml.safe_load(text)
    found["paths"] = {
        path: described for path, described in found["paths"].items() if not NOT_SERVED.search(path)
    }
    schemas = found["components"]["schemas"]
    for kind, reference in schemas["Artifact"]["discriminator"]["mapping"].items():
        schema = schemas[reference.rsplit("/", 1)[-1]]
        kind_only = {"properties": {"artifactType": {"enum": [kind]}}, "required": ["artifactType"]}
        schema["allOf"] = [*schema.get("allOf", []), kind_only]
    for path in found["paths"].values():
        for operation in path.values():
            if isinstance(operation, dict) and "responses" in operation:
                _add_what_the_server_does(operation["responses"])
        takes_page = any("pageSize" in str(parameter) for parameter in path.get("parameters", []))
        listing = path.get("get", {})
        if takes_page or "pageSize" in str(listing.get("parameters")):
            bad = {"$ref": "#/components/responses/BadRequest"}
            listing["responses"].setdefault("400", bad)
    return found


def _add_what_the_server_does(responses: dict[str, Any]) -> None:
    """Statuses that the real server was recorded to give, which its description leaves out."""
    for status, name in (
        ("400", "BadRequest"),
        ("404", "NotFound"),
        ("409", "Conflict"),
        ("422", "UnprocessableEntity"),
    ):
        responses.setdefault(status, {"$ref": f"#/components/responses/{name}"})
    if "200" in responses:
        responses.setdefault("201", responses["200"])


schema = schemathesis.openapi.from_dict(described("model-registry.yaml"))
schema_v1 = schemathesis.openapi.from_dict(described("model-registry-v1.yaml"))
for each in (schema, schema_v1):
    each.config.generation.update(modes=[GenerationMode.POSITIVE])


@schema.hook
@schema_v1.hook
def map_path_parameters(
    context: schemathesis.HookContext, path_parameters: dict[str, str] | None
) -> dict[str, str] | None:
    """Ids that exist, half of the time: random ones would show nothing but 404."""
    if path_parameters is None or len(given := "".join(path_parameters.values())) % 2:
        return path_parameters
    return dict.fromkeys(path_parameters, str(1 + len(given) // 2 % 12))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _filled(tmp_path_factory.mktemp("conformance"))


@pytest.fixture(scope="module")
def address_v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another registry, so that the tests of one API do not see what those of the other made."""
    yield from _filled(tmp_path_factory.mktemp("conformance-v1"))


def _filled(home: Path) -> Iterator[str]:
    """The address of a registry with two of each entity."""
    with running_registry(home) as address:
        with httpx.Client(base_url=address + PREFIX, headers=registry_headers()) as client:

            def make(path: str, **body: object) -> str:
                answer = client.post(path, json=body)
                answer.raise_for_status()
                return str(answer.json()["id"])

            for name in ("one", "two"):
                model = make("/registered_models", name=name)
                version = make("/model_versions", name="v", registeredModelId=model)
                make(
                    f"/model_versions/{version}/artifacts", artifactType="model-artifact", name="m"
                )
                place = make("/serving_environments", name=name)
                make("/inference_services", servingEnvironmentId=place, registeredModelId=model)
        yield address


@schema.parametrize()
@hypothesis.settings(max_examples=15, derandomize=True, deadline=None, database=None)
def test_every_operation_answers_as_described(case: Any, address: str) -> None:
    case.call_and_validate(base_url=address, checks=CHECKS, headers=registry_headers())


@pytest.mark.long
@schema_v1.parametrize()
@hypothesis.settings(max_examples=4, derandomize=True, deadline=None, database=None)
def test_every_operation_of_v1_answers_as_described(case: Any, address_v1: str) -> None:
    case.call_and_validate(base_url=address_v1, checks=CHECKS, headers=registry_headers())
