"""Shifting a model's traffic: one operation for promote, split and rollback.

A shift names the shares that apply afterwards, so it can be repeated: the next one completes what
a killed one left undone. One step moves the traffic: before it, users reach the same versions as
before the shift; after it, the requested ones.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from nudge.components.common.clients.registry.releases import (
    KEPT_HISTORY,
    NOT_PROMOTED,
    Served,
    Version,
    find_served,
    find_version,
    note_promotion,
    note_served,
)
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.measure import Counts
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer, SmokeAnswer, smoke_test

Check = Callable[[Served | None, dict[str, int]], None]
"""Called with the registry's record of what is served and the live traffic by version, while the
model's lease is held and before any change; raises to stop the shift."""


def unchecked(before: Served | None, live: dict[str, int]) -> None:
    """The check for a shift that a person asked for: always allowed."""


class Target(Protocol):
    """What serves versions: this machine, or KServe."""

    environment: str
    """Its name in the registry."""
    runtime: str

    def exclusive(self, model: str) -> contextlib.AbstractContextManager[None]:
        """Allow one shift of a model at a time in the block, or fail."""

    def live(self, model: str) -> dict[str, int]:
        """The percent of the traffic that each version receives now; empty if there is none."""

    def make_room(self, model: str, wanted: set[str]) -> bool:
        """If the wanted versions cannot start next to the others, stop the others first.

        Returns True if it stopped any. From then until `move`, users of a model that has no other
        version get 503.
        """

    def bring_up(self, version: Version) -> ModelServer:
        """Serve a version next to the others; returns its own server once it is ready."""

    def move(self, model: str, shares: dict[str, int]) -> str:
        """Split the traffic among running versions, in one atomic change. Returns the URL."""

    def retire(self, model: str, keep: set[str]) -> None:
        """Stop the versions not in ``keep``, once they have no request in flight."""

    def counts(self, model: str, version: str) -> Counts | None:
        """The requests to a running version so far; None if nothing counts them."""


def shift(
    target: Target,
    registry: Callable[[Any], Any],
    settings: DeploySettings,
    model: str,
    shares: Mapping[str, int],
    note: Callable[[str], None] = lambda stage: None,
    check: Check = unchecked,
    canary: str = "",
    servers: dict[str, ModelServer] | None = None,
) -> tuple[Served, dict[str, SmokeAnswer]]:
    """Start and test the versions in ``shares``, move the traffic, and record it in the registry.

    ``shares`` is percent by version and adds up to 100; ``registry`` runs work from
    `nudge.components.common.clients.registry.releases`; ``check`` raises if this shift must no
    longer happen. ``canary`` is the candidate whose canary asks for this shift, if one does;
    ``servers`` receives each version's server. Returns what is served now and each version's smoke
    answer.
    Raises `UserError`. The previous versions are then still served (or restored, if they had to
    make room), and a version that failed is removed. Only if the registry fails after the traffic
    has moved are the new versions served, and the error says so.
    """
    wanted = checked_shares(shares)
    with target.exclusive(model):
        before: Served | None = registry(find_served(model))
        # A killed shift may have moved the traffic without recording it in the registry.
        live = target.live(model)
        check(before, live)
        serving = {*live, *(before.shares if before else ())}
        versions = {name: registry(find_version(model, name)) for name in wanted}
        for version in versions.values():
            if version.archived and version.name not in serving:
                raise UserError(
                    f"{model} {version.name} is archived in the registry; make it LIVE there first"
                )
        answers: dict[str, SmokeAnswer] = {}
        made_room = True  # assume so until `make_room` returns
        try:
            made_room = target.make_room(model, set(wanted))
            for name, version in versions.items():
                note(f"starting {name}")
                server = target.bring_up(version)
                if servers is not None:
                    servers[name] = server
                note(f"testing {name}")
                answers[name] = smoke_test(server, version, settings)
            # A model takes minutes to start. If the registry is down by now, do not move anything.
            registry(find_served(model))
        except UserError as error:
            # Report it now: the cleanup may take as long as a request.
            note(f"failed: {error}"[:300])
            try:
                target.retire(model, serving)
            except UserError as left:
                raise UserError(f"{error}\nCleaning up failed: {left}") from None
            previous = dict.fromkeys(live, 100) if len(live) == 1 else before and before.shares
            if made_room and previous:
                _restore(target, registry, model, previous, error)
            raise
        note("moving the traffic")
        endpoint = target.move(model, wanted)
        history = _history(before, wanted)
        withdrawn = _withdrawn(before, live, {*wanted, *history})
        served = Served(model, endpoint, wanted, history, withdrawn, canary)
        main = versions[served.main]
        in_canary = bool(canary) and len(wanted) > 1  # which is no promotion yet
        try:
            registry(note_served(main, served, target.environment, target.runtime))
            for version in versions.values():
                if version.properties.get(NOT_PROMOTED) and not in_canary:
                    registry(note_promotion(version, ""))
        except UserError as error:
            names = " and ".join(wanted)
            raise UserError(
                f"users of {model} reach {names} now, but recording that in the registry failed: "
                f"{error}\nrun this again to record it, or `nudge rollback` to go back"
            ) from None
        note("stopping other versions")
        target.retire(model, set(wanted))
    return served, answers


def checked_shares(shares: Mapping[str, int]) -> dict[str, int]:
    """The shares that are not 0; raises `UserError` unless they add up to 100."""
    wanted = {name: share for name, share in shares.items() if share}
    if sum(wanted.values()) != 100 or any(share < 0 for share in wanted.values()):
        listed = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise UserError(f"the shares {listed} do not add up to 100 percent")
    return wanted


def _restore(
    target: Target,
    registry: Callable[[Any], Any],
    model: str,
    shares: Mapping[str, int],
    cause: UserError,
) -> None:
    """Restore the versions that made room for one that failed; always raises `UserError`."""
    names = " and ".join(shares)
    try:
        for name in shares:
            target.bring_up(registry(find_version(model, name)))
        target.move(model, dict(shares))
    except UserError as error:
        raise UserError(
            f"{cause}\nRestoring {names}, which had made room for it, failed, so no version is "
            f"served now: {error}"
        ) from None
    raise UserError(
        f"{cause}\nThe traffic is back on {names}, which had made room for it"
    ) from None


def _history(before: Served | None, wanted: Mapping[str, int]) -> tuple[str, ...]:
    """The versions that had all the traffic; returning to one drops those after it."""
    known = before.history if before else ()
    if len(wanted) != 1:
        return known
    (name,) = wanted
    if name in known:
        return known[: known.index(name) + 1]
    return (*known, name)


def _withdrawn(before: Served | None, live: Mapping[str, int], kept: set[str]) -> tuple[str, ...]:
    """The versions whose traffic was withdrawn: neither served nor in the history.

    A version that a newer one replaced is in the history. A version that a rollback left, or that
    had a share of a split that ended, is not.
    """
    known = (*before.withdrawn, *before.history, *before.shares) if before else ()
    gone = [name for name in dict.fromkeys((*known, *live)) if name not in kept]
    return tuple(gone[-KEPT_HISTORY:])
