"""The gateway's own promises: exact shares, and no request lost however often they change."""

import collections
import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from nudge.components.common import processes
from nudge.components.deploy import gateway

from tests.components.deploy.stream import Stream
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
    with httpx.Client() as client:
        answers = [client.post(f"{endpoint}/v1/completions", json={}) for _ in range(100)]
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    assert collections.Counter(texts) == {"v1": 93, "v2": 7}
    # A small share comes evenly, not in a row.
    places = [place for place, text in enumerate(texts) if text == "v2"]
    assert max(b - a for a, b in itertools.pairwise(places)) < 20
    (route,) = gateway.routes(home).values()
    assert (route.shares, route.servers) == ({"v1": 93, "v2": 7}, servers)


@pytest.mark.long
def test_no_change_loses_a_request(home: Path, servers: dict[str, str]) -> None:
    """A reload of Caddy per change lost about one in ten changes here."""
    endpoint = gateway.route(home, "m", servers, {"v1": 100}, 0)
    stream = Stream(endpoint, "m", clients=4)
    for change in range(CHANGES):
        wanted = "v2" if change % 2 else "v1"
        assert gateway.route(home, "m", servers, {wanted: 100}, 0) == endpoint
    stream.stop()
    assert stream.faults == []
    assert stream.seen() == {"v1", "v2"}
    assert gateway.drained(home, "m", servers["v1"])
    processes.stop(home, "gateway-m")
    assert not processes.records(home)
