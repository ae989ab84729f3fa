"""Downloads are bounded in size, and no redirect leads into a private network."""

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from nudge.components.common.core.errors import UserError
from nudge.components.ingest import sources
from nudge.components.ingest.downloads import WebLimits
from nudge.components.ingest.finding import find_sources
from tests.web_server import Server

SECRET = b"The secret of a service that only this machine can reach."


def to(target: str) -> Any:
    async def answer(_: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(target)

    return answer


async def secret(_: web.Request) -> web.StreamResponse:
    return web.Response(body=SECRET)


@pytest.fixture
def inner() -> Any:
    with Server(("*", "/{name}", secret)) as server:
        yield server


def read(uri: str, limits: WebLimits | None = None) -> bytes:
    (source,) = find_sources(uri, limits)
    with sources.ResumableFile(source) as file:
        return file.read()


@pytest.mark.parametrize("form", ["name", "ip", "mapped"])
def test_a_redirect_into_a_private_network_is_refused_unless_a_setting_allows_it(
    inner: Server, form: str
) -> None:
    port = inner.url.rpartition(":")[2]
    host = {"name": "localhost", "ip": "127.0.0.2", "mapped": "[::ffff:127.0.0.1]"}[form]
    target = f"http://{host}:{port}/a.txt"
    with Server(("*", "/a.txt", to(target))) as outer:
        # The host that was named may be private.
        assert outer.url.startswith("http://127.0.0.1:")
        with pytest.raises(
            UserError, match=r"redirects to .*ingest\.allow_private_addresses: true"
        ):
            read(f"{outer.url}/a.txt")
        if form == "name":
            assert read(f"{outer.url}/a.txt", WebLimits(allow_private=True)) == SECRET
    assert read(f"{inner.url}/a.txt") == SECRET


def test_a_redirect_to_another_scheme_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(SECRET)
    target = f"file://{tmp_path}/a.txt"
    with Server(("*", "/a.txt", to(target))) as outer, pytest.raises(UserError):
        read(f"{outer.url}/a.txt")


def test_downloads_of_known_and_unknown_length_are_bounded(
    inner: Server,
) -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        if request.method != "HEAD":
            while sent < 200_000_000:
                await response.write(bytes(100_000))
                sent += 100_000
        return response

    with pytest.raises(UserError, match=r"more than 20 bytes.*ingest\.max_download_bytes"):
        read(f"{inner.url}/a.txt", WebLimits(max_bytes=20))
    refused = pytest.raises(UserError, match=r"more than 1000000 bytes")
    with Server(("*", "/a.txt", endless)) as outer, refused:
        read(f"{outer.url}/a.txt", WebLimits(max_bytes=1_000_000))
    assert sent < 100_000_000
