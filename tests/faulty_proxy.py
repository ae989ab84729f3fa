"""A reverse HTTP proxy that injects faults into a seeded share of the requests.

It listens on 127.0.0.1 in front of any HTTP server: an S3 store (it keeps the Host header that the
client signed), the registry, a Kubernetes API. It can use TLS towards its clients.

    with FaultyProxy("http://127.0.0.1:9000", share=0.2, seed=1) as proxy:
        ...  # talk to proxy.url
        proxy.share = 0.0  # no more faults
        proxy.planned.append("lost")  # the next request is done, but its answer is lost
        proxy.counts["reset"]

| fault | what the client sees | does the server process it? |
|---|---|---|
| 500, 503, 429 | that status, at once; 503 and 429 with Retry-After | no |
| reset | the connection is reset without an answer | no |
| cut-upload | reset after half of the request's body was forwarded | it gets half |
| lost | reset after the server has answered | yes |
| cut-download | the answer's head and half of its body, then a reset | yes |
| slow | the correct answer, late and in small pieces | yes |
"""

import asyncio
import collections
import contextlib
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import aiohttp
import yarl
from aiohttp import web

from tests.web_server import Server

Fault = Literal["500", "503", "429", "reset", "cut-upload", "lost", "cut-download", "slow"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

# Headers of one connection, which a proxy does not forward (RFC 9110, 7.6.1); aiohttp sets them.
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 seconds: closing sends RST instead of FIN."""


class _Cut(Exception):
    """Stops forwarding a request's body."""


class FaultyProxy(Server):
    """A proxy in its own thread, from ``start`` (or ``with``) to ``stop``.

    ``share`` of the requests for which ``only(method, path)`` is true get one of ``faults``;
    ``planned`` faults come first, one per request. All three may change while it runs. ``counts``
    has the number of each injected fault, and of unharmed requests under "passed"; a fault that a
    request does not allow (no body to cut) counts as the one injected instead.
    """

    def __init__(
        self,
        upstream: str,
        *,
        share: float = 0.2,
        seed: int = 0,
        faults: Sequence[Fault] = FAULTS,
        only: Callable[[str, str], bool] = lambda method, path: True,
        retry_after_s: int = 1,
        slow_s: float = 0.3,
        tls: ssl.SSLContext | None = None,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(("*", "/{anything:.*}", self._handle), tls=tls)
        self.app.cleanup_ctx.append(self._connected)
        self.upstream = upstream.rstrip("/")
        self.share, self.faults, self.only = share, tuple(faults), only
        self.retry_after_s, self.slow_s = retry_after_s, slow_s
        self.planned: collections.deque[Fault] = collections.deque()
        self.counts: collections.Counter[str] = collections.Counter()
        self.requests: list[tuple[str, str, dict[str, str], str]] = []
        """Method, path, headers, and fault or "passed" of each request, in order."""
        self._random = random.Random(seed)
        self._trusted = trusted

    @property
    def hurt(self) -> int:
        """How many requests got a fault."""
        return sum(count for name, count in self.counts.items() if name != "passed")

    async def _connected(self, _: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(force_close=True, limit=0, ssl=self._trusted or True)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
            self._session = session
            yield

    def _choose(self, request: web.Request) -> Fault | None:
        if not self.only(request.method, request.raw_path):
            return None
        if self.planned:
            fault = self.planned.popleft()
        elif self._random.random() < self.share:
            fault = self._random.choice(self.faults)
        else:
            return None
        return "reset" if fault == "cut-upload" and not request.can_read_body else fault

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fault = self._choose(request)
        headers = dict(request.headers)
        self.requests.append((request.method, request.raw_path, headers, fault or "passed"))
        if fault in ("500", "503", "429"):
            self._count(fault)
            after = {} if fault == "500" else {"Retry-After": str(self.retry_after_s)}
            return web.Response(status=int(fault), headers=after, text=f"{fault}, by the proxy")
        if fault == "reset":
            return self._reset(request, fault)
        if fault == "slow":
            await asyncio.sleep(self.slow_s)
        try:
            answer = await self._forward(request, cut=fault == "cut-upload")
        except (_Cut, aiohttp.ClientError) as error:
            if fault == "cut-upload":
                return self._reset(request, fault)
            return web.Response(
                status=502, text=f"the proxy did not reach {self.upstream}: {error}"
            )
        async with answer:
            if fault in ("lost", "cut-upload"):
                await answer.read()
                return self._reset(request, fault)
            return await self._answer(request, answer, fault)

    async def _forward(self, request: web.Request, cut: bool) -> aiohttp.ClientResponse:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        return await self._session.request(
            request.method,
            yarl.URL(self.upstream + request.raw_path, encoded=True),
            headers=headers,
            data=_body(request, cut) if request.can_read_body else None,
            allow_redirects=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            timeout=aiohttp.ClientTimeout(total=None),
            server_hostname=urlsplit(self.upstream).hostname if self._trusted else None,
        )

    async def _answer(
        self, request: web.Request, answer: aiohttp.ClientResponse, fault: Fault | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                response.headers.add(name, value)
        if request.method == "HEAD" or answer.status in (204, 304):
            self._count("slow" if fault == "slow" else "passed")
            return response
        length = answer.content_length
        if fault == "cut-download" and length == 0:
            return self._reset(request, "lost")
        if length is None:
            response.enable_chunked_encoding()
        if fault != "cut-download":
            # Count before the body: a client with its last byte may read the counts at once.
            self._count("slow" if fault == "slow" else "passed")
        await response.prepare(request)
        left = (length or 2) // 2 if fault == "cut-download" else None
        async for chunk in answer.content.iter_any():
            if left is not None and len(chunk) > left:
                await response.write(chunk[:left])
                return self._reset(request, "cut-download", unsent=False)
            left = None if left is None else left - len(chunk)
            if fault == "slow":
                half = len(chunk) // 2
                await response.write(chunk[:half])
                await asyncio.sleep(self.slow_s / 10)
                chunk = chunk[half:]
            await response.write(chunk)
        if fault == "cut-download":
            self._count("passed")
        await response.write_eof()
        return response

    def _reset(self, request: web.Request, fault: Fault, unsent: bool = True) -> web.Response:
        self._count(fault)
        transport = request.transport
        if transport is not None:
            if unsent:
                with contextlib.suppress(OSError):
                    raw: Any = transport.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                transport.abort()
            else:  # close normally, so that the sent part arrives
                transport.close()
        return web.Response()

    def _count(self, name: str) -> None:
        self.counts[name] += 1


async def _body(request: web.Request, cut: bool) -> AsyncIterator[bytes]:
    left = (request.content_length or 2) // 2
    async for chunk in request.content.iter_any():
        if cut and len(chunk) >= left:
            yield chunk[:left]
            raise _Cut
        left -= len(chunk)
        yield chunk
