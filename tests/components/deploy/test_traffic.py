"""Shifting traffic: repeated, killed at every boundary, refused; the registry is real."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import (
    Served,
    Version,
    find_served,
    list_versions,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from nudge.components.deploy import deploy, targets, traffic
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer, SmokeAnswer
from tests.local_registry import running_registry


class Killed(BaseException):
    """Represents SIGKILL: no handler catches it to clean up."""


class MemoryTarget:
    """A target in memory that can be killed at its n-th change."""

    environment, runtime = "test", "none"

    def __init__(self) -> None:
        self.up: set[str] = set()
        self.shares: dict[str, int] = {}
        self.kill_at = 0
        self.one_gpu = False

    def _change(self) -> None:
        self.kill_at -= 1
        if self.kill_at == 0:
            raise Killed

    @contextlib.contextmanager
    def exclusive(self, model: str) -> Iterator[None]:
        yield

    def live(self, model: str) -> dict[str, int]:
        return dict(self.shares)

    def make_room(self, model: str, wanted: set[str]) -> bool:
        if not self.one_gpu or wanted <= self.up or self.up <= wanted:
            return False
        self._change()
        self.shares = {}
        self._change()
        self.up &= wanted
        self._change()
        return True

    def counts(self, model: str, version: str) -> None:
        """Nothing counts the requests here."""

    def bring_up(self, version: Version) -> ModelServer:
        self._change()
        if self.one_gpu and self.up - {version.name}:
            raise UserError(f"no GPU is left for {version.name}")
        self.up.add(version.name)
        self._change()
        return ModelServer(f"http://{version.name}")

    def move(self, model: str, shares: dict[str, int]) -> str:
        self._change()
        assert set(shares) <= self.up
        self.shares = dict(shares)
        self._change()
        return "http://endpoint"

    def retire(self, model: str, keep: set[str]) -> None:
        self._change()
        self.up &= keep
        self._change()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("traffic")
    with running_registry(home) as address:
        yield address


@pytest.fixture
def shift(
    address: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Served]:
    """Shifts a model of this test alone; it has versions v1 to v4, of which v4 is archived."""
    from model_registry import ModelRegistry

    name = request.node.name.replace("[", "-").replace("]", "")
    client = ModelRegistry(address, author="test", is_secure=False)
    for version in ("v1", "v2", "v3", "v4"):
        client.register_model(
            name, f"s3://b/{version}", version=version, model_format_name="f",
            model_format_version="1",
        )  # fmt: skip
    archived = client.get_model_version(name, "v4")
    archived.state = type(archived.state).ARCHIVED
    client.update(archived)

    def smoke(server: ModelServer, version: Version, _: DeploySettings) -> SmokeAnswer:
        if version.name == "v3":
            raise UserError("v3 says nothing")
        return SmokeAnswer("a prompt", "an answer")

    monkeypatch.setattr(traffic, "smoke_test", smoke)

    def registry(work: Any) -> Any:
        return with_registry(address, work)

    def run(target: MemoryTarget, **shares: int) -> Served:
        return traffic.shift(target, registry, DeploySettings(), name, shares)[0]

    run.served = lambda: registry(find_served(name))  # type: ignore[attr-defined]
    run.versions = lambda: registry(list_versions(name))  # type: ignore[attr-defined]
    return run


def test_promote_split_and_rollback(shift: Any) -> None:
    target = MemoryTarget()
    assert shift(target, v1=100).before is None
    served = shift(target, v2=100)
    assert (served.main, served.before, target.up) == ("v2", "v1", {"v2"})
    split = shift(target, v1=10, v2=90)
    assert (split.main, split.history, target.up) == ("v2", ("v1", "v2"), {"v1", "v2"})
    back = shift(target, v1=100)
    assert (back.main, back.before, back.history) == ("v1", None, ("v1",))
    assert shift.served() == back
    assert target.shares == {"v1": 100}


def test_repeating_a_shift_changes_nothing(shift: Any) -> None:
    target = MemoryTarget()
    assert shift(target, v1=100) == shift(target, v1=100) == shift.served()


@pytest.mark.parametrize("boundary", range(1, 7))
def test_a_shift_killed_at_any_boundary_can_be_repeated_or_undone(
    shift: Any, boundary: int
) -> None:
    target = MemoryTarget()
    shift(target, v1=100)
    target.kill_at = boundary
    with pytest.raises(Killed):
        shift(target, v2=100)
    assert target.shares in ({"v1": 100}, {"v2": 100})
    assert set(target.shares) <= target.up, "users are sent to a version that is not up"
    served = shift(target, v2=100)
    assert (target.shares, target.up) == ({"v2": 100}, {"v2"})
    assert (served.main, served.before) == ("v2", "v1")
    assert shift.served() == served
    target.kill_at = boundary
    with pytest.raises(Killed):
        shift(target, v1=100)
    undone = shift(target, v2=100)
    assert (undone.main, target.up, target.shares) == ("v2", {"v2"}, {"v2": 100})


def test_a_version_that_fails_its_smoke_test_gets_no_traffic(shift: Any) -> None:
    target = MemoryTarget()
    shift(target, v1=100)
    before = shift.served()
    with pytest.raises(UserError, match="v3 says nothing"):
        shift(target, v3=100)
    assert (target.shares, target.up, shift.served()) == ({"v1": 100}, {"v1"}, before)
    with pytest.raises(UserError, match="v3 says nothing"):
        shift(target, v1=50, v3=50)
    assert (target.shares, target.up) == ({"v1": 100}, {"v1"})


@pytest.mark.parametrize("boundary", range(1, 10))
def test_a_shift_killed_while_making_room_can_be_repeated_or_undone(
    shift: Any, boundary: int
) -> None:
    target = MemoryTarget()
    shift(target, v1=100)
    target.one_gpu = True
    for wanted in ("v2", "v1"):  # finish it, then undo it
        target.kill_at = boundary
        with pytest.raises(Killed):
            shift(target, v2=100)
        assert set(target.shares) <= target.up, "users are sent to a version that is not up"
        target.kill_at = 0
        served = shift(target, **{wanted: 100})
        assert (target.shares, target.up, served.main) == ({wanted: 100}, {wanted}, wanted)
        assert shift.served() == served
        shift(target, v1=100)


def test_a_version_that_made_room_is_restored(shift: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = MemoryTarget()
    target.one_gpu = True
    shift(target, v1=100)
    before = shift.served()
    with pytest.raises(UserError, match="v3 says nothing\nThe traffic is back on v1, which"):
        shift(target, v3=100)
    assert (target.shares, target.up, shift.served()) == ({"v1": 100}, {"v1"}, before)

    def dead(version: Version) -> ModelServer:
        raise UserError(f"{version.name} does not start")

    monkeypatch.setattr(target, "bring_up", dead)
    lost = "v3 does not start\nRestoring v1, which had made room for it, failed, so no version is"
    with pytest.raises(UserError, match=lost):
        shift(target, v3=100)


def test_a_failed_shift_after_a_killed_one_keeps_the_live_version(shift: Any) -> None:
    target = MemoryTarget()
    shift(target, v1=100)
    target.kill_at = 4  # the traffic has moved, but the registry has no record of it
    with pytest.raises(Killed):
        shift(target, v2=100)
    assert target.shares == {"v2": 100}
    assert shift.served().main == "v1"
    with pytest.raises(UserError, match="v3 says nothing"):
        shift(target, v3=100)
    assert "v2" in target.up


@pytest.mark.parametrize(("answers", "moved"), [(2, False), (3, True)])
def test_a_registry_that_fails_during_a_shift(
    shift: Any, monkeypatch: pytest.MonkeyPatch, address: str, answers: int, moved: bool
) -> None:
    target = MemoryTarget()
    shift(target, v1=100)
    shift(target, v2=100)
    model, before = shift.served().model, shift.served()
    remaining = answers

    def registry(work: Any) -> Any:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise UserError("the model registry does not answer")
        return with_registry(address, work)

    message = f"users of {model} reach v1 now, but recording that" if moved else "^the model reg"
    with pytest.raises(UserError, match=message):
        traffic.shift(target, registry, DeploySettings(), model, {"v1": 100})
    assert target.shares == ({"v1": 100} if moved else {"v2": 100})
    assert shift.served() == before
    # A rollback returns to the version served before the failure, not to the one before it.
    monkeypatch.setenv("NUDGE_REGISTRY_URL", address)
    monkeypatch.setattr(targets, "find_target", lambda settings, served: target)
    back = deploy.rollback(DeploySettings(), registered_model=model)
    assert back["version"] == ("v2" if moved else "v1")
    assert target.shares == {back["version"]: 100}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"v1": 60, "v2": 30}, "v1 60, v2 30 do not add up to 100"),
        ({}, "do not add up"),
        ({"v1": 150, "v2": -50}, "do not add up"),
        ({"v4": 100}, "archived"),
        ({"v5": 100}, "no version 'v5'.*did you mean"),
    ],
)
def test_wrong_shares_are_refused(shift: Any, shares: dict[str, int], message: str) -> None:
    target = MemoryTarget()
    with pytest.raises(UserError, match=message):
        shift(target, **shares)
    assert target.up == set()


def test_a_registry_that_is_down_moves_nothing(tmp_path: Path) -> None:
    target = MemoryTarget()

    def registry(work: Any) -> Any:
        return with_registry(f"http://127.0.0.1:{processes.free_port()}", work, attempts_s=0.5)

    with pytest.raises(UserError, match="does not answer"):
        traffic.shift(target, registry, DeploySettings(), "m", {"v1": 100})
    assert (target.up, target.shares) == (set(), {})
