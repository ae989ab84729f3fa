"""The functions of `releases` on versions in memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from nudge.components.common.clients.registry import releases
from nudge.components.common.clients.registry.releases import Served, Version
from nudge.components.common.core.errors import UserError
from tests.components.deploy.orders import World, actor


def run_in_memory(url: str, work: Any, attempts_s: float = 0) -> Any:
    """What `with_registry` returns, for work that never waits."""
    coroutine = work(None)
    with pytest.raises(StopIteration) as done:
        coroutine.send(None)
    return done.value.value


class MemoryRegistry:
    """``world`` gives the world whose versions are registered."""

    def __init__(self, world: Callable[[], World]) -> None:
        self._world = world

    @staticmethod
    def _work(do: Callable[[], Any]) -> Any:
        async def work(_: Any) -> Any:
            return do()

        return work

    def _change(self, name: str, values: dict[str, Any]) -> None:
        known = self._world().versions[name]
        properties = {**known.properties, **values}
        self._world().versions[name] = dataclasses.replace(known, properties=properties)

    def find_version(self, model: str, name: str) -> Any:
        def look() -> Version:
            if name not in self._world().versions:
                raise UserError(f"no version {name}")
            return self._world().versions[name]

        return self._work(look)

    def list_versions(self, model: str) -> Any:
        return self._work(lambda: list(self._world().versions.values()))

    def find_served(self, model: str) -> Any:
        return self._work(lambda: self._world().served)

    def note_served(self, version: Version, served: Served, *_: str) -> Any:
        def write() -> None:
            actor().step("note_served")
            self._world().served = served

        return self._work(write)

    def note_promotion(self, version: Version, reason: str) -> Any:
        def write() -> None:
            actor().step("note_promotion")
            values = {"promoted": not reason, releases.NOT_PROMOTED: reason}
            self._change(version.name, values)

        return self._work(write)

    def note_properties(self, version_id: str, values: Any) -> Any:
        def write() -> None:
            actor().step("note")
            if values.get("approval") == "approved":
                self._world().approved |= {version_id}
            self._change(version_id, values)

        return self._work(write)

    def archive(self, version_id: str) -> Any:
        def write() -> None:
            known = self._world().versions[version_id]
            self._world().versions[version_id] = dataclasses.replace(known, archived=True)

        return self._work(write)
