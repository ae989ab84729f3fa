"""The embedded registry in a thread of this process, with the rules of either real database."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from nudge.pipelines.local.registry.app import VERSIONS, create_app


@contextlib.contextmanager
def registry_server(
    folder: Path,
    collation: Any = "postgresql",
    versions: tuple[str, ...] = VERSIONS,
    around: Callable[[Any], Any] = lambda app: app,
) -> Iterator[str]:
    """The URL of a registry over ``folder/registry.sqlite``; it stops with the block.

    ``around`` may wrap the ASGI application.
    """
    app = around(create_app(folder / "registry.sqlite", collation, versions))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
