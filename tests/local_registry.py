"""An embedded registry for a test; its token is where clients look for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nudge.components.common.core.environment import REGISTRY_TOKEN_PATH
from nudge.components.common.local import guard, processes
from nudge.components.deploy.local import gateway
from nudge.pipelines.local import parts, services


@contextlib.contextmanager
def running_registry(home: Path) -> Iterator[str]:
    """Yields the URL; the token's file is in this process's variables during the block."""
    address = parts.start_registry(home, 0).address
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REGISTRY_TOKEN_PATH, str(guard.token_file(home, services.REGISTRY)))
        yield address
    processes.stop(home, services.REGISTRY)


def registry_headers() -> dict[str, str]:
    """The headers for a request to that registry."""
    token = Path(os.environ[REGISTRY_TOKEN_PATH]).read_text()
    return {"Authorization": f"Bearer {token}"}


def endpoint_token(home: Path) -> str:
    """The token of the models served below a home."""
    return guard.read_token(home, gateway.TOKEN)


def endpoint_headers(home: Path) -> dict[str, str]:
    """The headers for a request to a model served below a home."""
    return {"Authorization": f"Bearer {endpoint_token(home)}"}
