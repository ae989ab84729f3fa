"""A promote on this machine that kills itself with SIGKILL: ``python -m ... MODEL VERSION AT``.

AT is the number of the boundary, before or after a change that a shift makes; 0 means never. The
servers answer with their version and start at once.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nudge.components.common.clients.registry.releases import note_served
from nudge.components.common.local import processes
from nudge.components.deploy import traffic
from nudge.components.deploy.deploy import deploy
from nudge.components.deploy.local.local_serving import LocalServing, service_name
from nudge.components.deploy.settings import DeploySettings

BOUNDARIES = 8


def quick_server(
    self: LocalServing, folder: Path, model: str, version: str
) -> processes.ServiceRecord:
    """Replaces `LocalServing._serve`: see `quick_server.py`."""
    port = processes.free_port()
    address = f"http://127.0.0.1:{port}"
    return processes.start(
        self._home,
        service_name(model, version),
        [sys.executable, str(Path(__file__).with_name("quick_server.py")), version, str(port)],
        address=address,
        ready=lambda: processes.answers(f"{address}/health"),
        timeout_s=60,
    )


def promote(model: str, version: str) -> None:
    deploy(DeploySettings(), registered_model=model, version=version)


class Killer:
    def __init__(self, at: int) -> None:
        self.left = at

    def boundary(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self.boundary()
            result = function(*arguments, **named)
            self.boundary()
            return result

        return call

    def record(self, note: Callable[..., Any]) -> Callable[..., Any]:
        """Registry work with a boundary before and after it."""

        def noted(*arguments: Any) -> Any:
            work = note(*arguments)

            async def cut(client: Any) -> None:
                self.boundary()
                await work(client)
                self.boundary()

            return cut

        return noted


if __name__ == "__main__":
    killer = Killer(int(sys.argv[3]))
    LocalServing._serve = quick_server  # type: ignore[method-assign]
    for name in ("bring_up", "move", "retire"):
        setattr(LocalServing, name, killer.around(getattr(LocalServing, name)))
    traffic.note_served = killer.record(note_served)  # type: ignore[attr-defined]
    promote(sys.argv[1], sys.argv[2])
