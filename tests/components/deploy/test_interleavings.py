"""Every interleaving of two runs, one manual move and one crash, with the real logic of deploy.

The actors take their steps in every order that the model's lease allows, and one of them may be
killed before any step. A step reads or changes the traffic or the registry, which are both in
memory here. Reads under the lease belong to the step before them, because a change of what they
read needs the lease. Orders that lead to the same state are followed once.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from nudge.components.common.clients.registry import connection, releases
from nudge.components.common.core import progress, provenance
from nudge.components.deploy import approval, canary, targets, traffic
from nudge.components.deploy.measure import Measured
from nudge.components.deploy.smoke import ModelServer, SmokeAnswer
from nudge.components.evaluate import incumbent as standing
from tests.components.deploy.memory_registry import MemoryRegistry, run_in_memory
from tests.components.deploy.orders import (
    SETTINGS,
    Orders,
    World,
    actor,
    approver,
    person,
)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Orders]:
    """Creates an `Orders` whose actors use its world as registry and as target."""
    made: list[Orders] = []

    def make(*arguments: Any) -> Orders:
        made.append(Orders(*arguments))
        return made[-1]

    def world() -> World:
        return made[-1].world

    @contextlib.contextmanager
    def quiet(*_: Any, **__: Any) -> Iterator[Any]:
        yield SimpleNamespace(advance=lambda *_, **__: None)

    def observe(_: Any, servers: dict[str, ModelServer], __: Any) -> dict[str, Measured]:
        actor().step("observe")
        return {
            name: Measured(requests=9, errors=9 if name in world().slow else 0) for name in servers
        }

    registry = MemoryRegistry(world)
    functions = ("find_version", "find_served", "note_served", "note_promotion")
    more = ("note_properties", "archive", "list_versions")
    for module, names in ((releases, (*functions, *more)), (traffic, functions)):
        for name in names:
            monkeypatch.setattr(module, name, getattr(registry, name))
    monkeypatch.setattr(approval, "now", lambda: "2026-01-01T00:00:00+00:00")
    monkeypatch.setattr(progress, "progress", quiet)
    monkeypatch.setattr(provenance, "this_run", lambda given: given)  # a person's command is no run
    monkeypatch.setattr(connection, "with_registry", run_in_memory)
    monkeypatch.setattr(traffic, "smoke_test", lambda *_: SmokeAnswer("a prompt", "an answer"))
    monkeypatch.setattr(canary, "_observe", observe)
    monkeypatch.setattr(targets, "find_target", lambda *_: world())
    monkeypatch.setattr(targets, "target_name", lambda *_: "local")
    monkeypatch.setattr(standing, "_silent", lambda _: "")
    monkeypatch.setenv("NUDGE_RUN_ID", "")
    return make


MOVES: dict[str, dict[str, int] | None] = {
    "rollback": None,
    "promote v0": {"v0": 100},
    "split v1 and v0": {"v1": 50, "v0": 50},
    "promote worse": {"worse": 100},
    "split v1 and worse": {"v1": 50, "worse": 50},
}


@pytest.mark.parametrize(
    ("served", "move"),
    [
        (True, None), (False, None), (True, "rollback"), (True, "promote v0"),
        (True, "split v1 and worse"),
        *(pytest.param(True, move, marks=pytest.mark.long)
          for move in ("split v1 and v0", "promote worse")),
        *(pytest.param(False, move, marks=pytest.mark.long) for move in MOVES),
    ],
)  # fmt: skip
def test_no_order_gives_traffic_to_a_version_that_lost(
    orders: Any, served: bool, move: str | None
) -> None:
    found = orders(served, (lambda world: person(world, MOVES[move])) if move else None)
    found.follow()
    assert found.followed > 20
    # Each run can win, so a refusal always has a cause.
    assert found.ends >= {"better", "worse"}
    if move is None:
        assert found.ends == {"better", "worse"}, "one of two runs that beat v1 is promoted"


def test_no_order_gives_traffic_without_an_approval_or_after_the_baseline_moved(
    orders: Any,
) -> None:
    found = orders(True, approver, "approver")
    found.follow()
    assert found.followed > 20
    assert found.ends == {"v1", "worse", "better"}


@pytest.mark.parametrize(
    ("shares", "slow", "move"),
    [
        ([50, 100], "better", None),
        *(pytest.param([25, 100], "", move, marks=pytest.mark.long)
          for move in (None, "rollback")),
        *(pytest.param([5, 25, 100], slow, move, marks=pytest.mark.long)
          for slow in ("", "better") for move in (None, "rollback", "promote v0")),
    ],
)  # fmt: skip
def test_no_order_of_canaries_gives_traffic_to_a_version_that_lost(
    orders: Any, shares: list[int], slow: str, move: str | None
) -> None:
    """The same invariants at every share, and a canary neither skips a share nor ends a person's
    move; killed between any two steps, it continues or stays as it is."""
    settings = dataclasses.replace(SETTINGS, canary=shares)
    by_hand = (lambda world: person(world, MOVES[move])) if move else None
    found = orders(True, by_hand, "person", settings, slow)
    found.follow()
    assert found.followed > 20
    assert found.ends >= ({"worse", "v1"} if slow else {"better", "worse"})
    assert slow not in found.ends or not slow
    if move is None:
        assert all(len(end.split()) == 1 for end in found.ends), "a canary always ends"
