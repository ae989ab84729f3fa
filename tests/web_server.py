"""A small web server for tests: an aiohttp application in its own thread."""

import asyncio
import socket
import ssl
import threading
from typing import Any, Self

from aiohttp import web

Route = tuple[str, str, Any]
"""Method (or ``*``), path and handler."""


class Server:
    """Serves on 127.0.0.1, at ``url``, from ``start`` (or ``with``) to ``stop``; with ``tls`` if
    set. Handlers get bodies as sent, including compressed ones."""

    def __init__(self, *routes: Route, tls: ssl.SSLContext | None = None) -> None:
        self.app = web.Application(client_max_size=1 << 30)
        for method, path, handler in routes:
            self.app.router.add_route(method, path, handler)
        self._tls = tls
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        port = self._socket.getsockname()[1]
        # Certificates name localhost.
        return f"https://localhost:{port}" if self._tls else f"http://127.0.0.1:{port}"

    def start(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self) -> None:
        runner = web.AppRunner(
            self.app, access_log=None, auto_decompress=False, shutdown_timeout=0.1
        )
        self._loop.run_until_complete(runner.setup())
        site = web.SockSite(runner, self._socket, ssl_context=self._tls)
        self._loop.run_until_complete(site.start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()
