"""The gateway's own promises: exact shares, and no request lost however often they change."""

import collections
import itertools
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from click.testing import CliRunner

from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from nudge.components.deploy.local import gateway
from nudge.pipelines.cli.main import main
from tests.components.deploy.stream import Stream
from tests.local_registry import endpoint_headers, endpoint_token
from tests.web_server import Server

CHANGES = 200


def _server(version: str) -> Server:
    async def complete(_: web.Request) -> web.Response:
        return web.json_response({"choices": [{"text": version}]})

    return Server(("POST", "/v1/completions", complete))


@pytest.fixture
def servers() -> Iterator[dict[str, str]]:
    with _server("v1") as first, _server("v2") as second:
        started = {"v1": first, "v2": second}
        yield {name: server.url.removeprefix("http://") for name, server in started.items()}


def test_shares_are_exact(home: Path, servers: dict[str, str]) -> None:
    endpoint = gateway.route(home, "m", servers, {"v1": 93, "v2": 7}, 0)
    with httpx.Client(headers=endpoint_headers(home)) as client:
        answers = [client.post(f"{endpoint}/v1/completions", json={}) for _ in range(100)]
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert collections.Counter(texts) == {"v1": 93, "v2": 7}
    # A small share comes evenly, not in a row.
    positions = [position for position, text in enumerate(texts) if text == "v2"]
    assert max(b - a for a, b in itertools.pairwise(positions)) < 20
    (route,) = gateway.routes(home).values()
    assert (route.shares, route.servers) == ({"v1": 93, "v2": 7}, servers)


def test_the_model_is_listed_as_openai_does(home: Path, servers: dict[str, str]) -> None:
    """The servers know nothing of /v1/models here, and of too much in a real one."""
    endpoint = gateway.route(home, "a.b-1", servers, {"v1": 100}, 0)
    listed = httpx.get(f"{endpoint}/v1/models", headers=endpoint_headers(home))
    assert listed.headers["content-type"] == "application/json"
    (entry,) = listed.json().pop("data")
    assert listed.json()["object"] == "list"
    assert (entry["id"], entry["object"], entry["owned_by"]) == ("a.b-1", "model", "nudge")
    assert isinstance(entry["created"], int)
    assert httpx.get(f"{endpoint}/v1/models/a.b-1", headers=endpoint_headers(home)).json() == entry
    head = httpx.head(f"{endpoint}/v1/models", headers=endpoint_headers(home))
    assert (head.status_code, head.content) == (200, b"")
    # All else is for the servers.
    assert (
        httpx.get(f"{endpoint}/v1/models/other", headers=endpoint_headers(home)).status_code == 404
    )
    assert (
        httpx.post(f"{endpoint}/v1/models", json={}, headers=endpoint_headers(home)).status_code
        == 404
    )
    assert (
        httpx.post(
            f"{endpoint}/v1/completions", json={}, headers=endpoint_headers(home)
        ).status_code
        == 200
    )


def test_the_table_of_parts_shows_where_users_meet_the_model(
    home: Path, servers: dict[str, str]
) -> None:
    endpoint = gateway.route(home, "m", servers, {"v1": 100}, 0)
    done = CliRunner().invoke(main, ["services", "status", "--json"], catch_exceptions=False)
    (row,) = json.loads(done.stdout)
    assert (row["name"], row["state"], row["address"]) == ("gateway-m", "running", endpoint)


def test_a_taken_port_is_said_and_another_one_moves_the_model(
    home: Path, servers: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    shares = {"v1": 100}
    endpoint = gateway.route(home, "m", servers, shares, 0)
    port = gateway.routes(home)["m"].port
    assert gateway.route(home, "m", servers, shares, port) == endpoint
    processes.stop(home, "gateway-m")
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(UserError, match=f"another program has taken port {port}") as error:
            gateway.route(home, "m", servers, shares, 0)
        assert "nudge promote v1 --model m --port PORT" in str(error.value)
        with pytest.raises(UserError, match=f"deploy.port {port} .* asked for m, is taken"):
            gateway.route(home, "m", servers, shares, port)
        capsys.readouterr()
        free = processes.free_port()
        moved = gateway.route(home, "m", servers, shares, free)
    assert moved == f"http://127.0.0.1:{free}"
    assert f"m moved from port {port} to {moved}" in capsys.readouterr().err
    assert (
        httpx.post(f"{moved}/v1/completions", json={}, headers=endpoint_headers(home)).status_code
        == 200
    )
    # It stays there, and leaves there too when it is asked to.
    assert gateway.route(home, "m", servers, shares, 0) == moved
    assert gateway.route(home, "m", servers, shares, port) == endpoint
    assert (
        httpx.post(
            f"{endpoint}/v1/completions", json={}, headers=endpoint_headers(home)
        ).status_code
        == 200
    )
    assert processes.port_is_free(free)


@pytest.mark.long
def test_no_change_loses_a_request(home: Path, servers: dict[str, str]) -> None:
    """A reload of Caddy per change lost about one in ten changes here."""
    endpoint = gateway.route(home, "m", servers, {"v1": 100}, 0)
    stream = Stream(endpoint, "m", endpoint_token(home), clients=4)
    for change in range(CHANGES):
        wanted = "v2" if change % 2 else "v1"
        assert gateway.route(home, "m", servers, {wanted: 100}, 0) == endpoint
    stream.stop()
    assert stream.faults == []
    assert stream.seen() == {"v1", "v2"}
    assert gateway.drained(home, "m", servers["v1"])
    processes.stop(home, "gateway-m")
    assert not processes.records(home)
