"""Limits of downloads from the web: their size, and the hosts that a redirect may lead to.

A public address may redirect to this machine or network, such as a cloud's metadata server at
169.254.169.254. So only the host that `data_uri` names may be private. The addresses of every other
host are checked when a redirect connects to it.
"""

import ipaddress
from dataclasses import dataclass
from typing import Any

import aiohttp
import aiohttp.resolver
import fsspec.callbacks

from nudge.components.common.core.errors import UserError


@dataclass(frozen=True)
class WebLimits:
    """What a recipe allows for downloads from http:// and https:// addresses."""

    allow_private: bool = False
    max_bytes: int = 16 << 30

    def check_size(self, size: int | None, uri: str) -> None:
        """Raise `UserError` if a download is larger than allowed."""
        if size is not None and size > self.max_bytes:
            raise UserError(
                f"{uri}: the download has more than {self.max_bytes} bytes; if that is right, "
                "raise ingest.max_download_bytes"
            )


class Counting(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Stops a download of unknown length that becomes too large."""

    def __init__(self, limits: WebLimits, uri: str) -> None:
        super().__init__()
        self._limits, self._uri, self._bytes = limits, uri, 0

    def relative_update(self, inc: int = 1) -> None:
        self._bytes += inc
        self._limits.check_size(self._bytes, self._uri)


@dataclass(frozen=True)
class Client:
    """Creates the sessions of fsspec's HTTP file system; ``named`` is the host in the URI."""

    named: str
    limits: WebLimits

    async def __call__(self, **options: Any) -> aiohttp.ClientSession:
        async def check(request: Any, handler: Any) -> Any:
            self._check(request.url.host or "", [request.url.host or ""])
            return await handler(request)

        connector = aiohttp.TCPConnector(resolver=_Resolver(self))
        return aiohttp.ClientSession(connector=connector, middlewares=(check,), **options)

    def _check(self, host: str, addresses: list[str]) -> None:
        if self.limits.allow_private or host == self.named:
            return
        if any(_is_private(address) for address in addresses):
            raise UserError(
                f"a download from {self.named} redirects to {host}, which is on a private network "
                "or this machine; if that is right, set ingest.allow_private_addresses: true"
            )


class _Resolver(aiohttp.resolver.DefaultResolver):  # type: ignore[misc, valid-type]
    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    async def resolve(self, host: str, *args: Any, **options: Any) -> Any:
        found = await super().resolve(host, *args, **options)
        self._client._check(host, [each["host"] for each in found])
        return found


def _is_private(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a name; checked once it is resolved
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return not (mapped or parsed).is_global
