"""A faulty registry: transient faults of every kind are retried, others are reported."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from nudge.components.common.clients.registry.connection import (
    Unreachable,
    registry_url,
    with_registry,
)
from nudge.components.common.clients.registry.releases import find_served, find_version
from nudge.components.common.clients.registry.values import check_sendable
from nudge.components.common.core.errors import UserError
from tests.faulty_proxy import FAULTS, Fault, FaultyProxy
from tests.local_registry import running_registry
from tests.web_server import Server


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home: Path = tmp_path_factory.mktemp("registry")
    with running_registry(home) as address:
        yield address


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_once_is_retried(registry: str, fault: Fault) -> None:
    with FaultyProxy(registry, share=0) as proxy:
        proxy.planned.append(fault)
        assert with_registry(proxy.url, find_served("nothing")) is None
        assert proxy.hurt == 1


def test_permanent_errors_are_not_retried(registry: str) -> None:
    with FaultyProxy(registry, share=0) as proxy:
        with pytest.raises(UserError, match="the registry has no model 'nothing'"):
            with_registry(proxy.url, find_version("nothing", "v1"))
        requested = [path.rpartition("/")[2].partition("?")[0] for _, path, _, _ in proxy.requests]
        assert requested == ["registered_model", "registered_models"]


@pytest.mark.parametrize(
    "ending",
    ["", "/", "/api/model_registry", "/api/model_registry/v1alpha3/", "/api/model_registry/v1"],
)
def test_a_url_may_end_with_the_api_path(registry: str, ending: str) -> None:
    assert registry_url(f" {registry}{ending}\n") == registry
    assert with_registry(registry + ending, find_served("nothing")) is None


def test_the_path_of_a_gateway_is_kept() -> None:
    url = "https://gateway/team/registry"
    assert registry_url(f"{url}/api/model_registry/v1alpha3") == url


@pytest.mark.parametrize(
    "url",
    ["registry:8080", "ftp://registry", "https://", "https://h:x", "https://h/?a=1", "http://a b"],
)
def test_invalid_urls_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not the URL of a model registry"):
        registry_url(url)


def test_a_password_in_a_url_is_not_repeated() -> None:
    with pytest.raises(UserError, match="not the URL") as refused:
        registry_url("https://me:secret@host/path")
    assert "secret" not in str(refused.value)


async def page(_: web.Request) -> web.Response:
    return web.Response(text="<html>sign in</html>", content_type="text/html")


async def no_page(_: web.Request) -> web.Response:
    return web.Response(status=404, text="404 page not found\n")


async def no_resource(_: web.Request) -> web.Response:
    return web.json_response({"kind": "Status", "code": 404, "message": "not found"}, status=404)


async def no_route(_: web.Request) -> web.Response:
    return web.json_response({"detail": "Not Found"}, status=404)


@pytest.mark.parametrize("handler", [page, no_page, no_resource, no_route])
def test_only_answers_in_the_registrys_form_count(handler: Any) -> None:
    with (
        Server(("*", "/{path:.*}", handler)) as server,
        pytest.raises(Unreachable, match="is not a Model Registry"),
    ):
        with_registry(server.url, find_served("nothing"))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"loss": {"double_value": math.nan}}, "loss.double_value is nan"),
        ({"loss": {"double_value": -math.inf}}, "loss.double_value is -inf"),
        ({"name": "n" * 256}, "name has 256 characters"),
        ({"externalId": "n" * 256}, "externalId has 256 characters"),
        ({"uri": "x" * 65_536}, "uri has 65536 bytes"),
        ({"uri": "é" * 32_768}, "uri has 65536 bytes"),
        ({"customProperties": {"k" * 256: {}}}, "the name of the property 'kkk"),
        ([{"a\0": 1}], "contains a NUL"),
    ],
)
def test_what_no_registry_stores_is_refused_with_its_field(body: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_sendable(body)


def test_what_every_registry_stores_is_sent() -> None:
    check_sendable({"name": "n" * 255, "uri": "x" * 65_535, "customProperties": {"k" * 255: 0.5}})


def test_a_wrong_registry_path_is_reported(registry: str) -> None:
    with pytest.raises(Unreachable, match="is not a Model Registry"):
        with_registry(f"{registry}/elsewhere", find_served("nothing"))
