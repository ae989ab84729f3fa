"""Which version answers: one operation for promote, split and rollback.

A shift names the shares that should hold afterwards, so it can be repeated: what a killed one left
undone, the next one does. Until the one step that moves the traffic, users meet what they met
before; from it on, what was asked for.
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
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer, smoke_test

Check = Callable[[Served | None, dict[str, int]], None]
"""Called with what the registry says is served and the traffic by version as it is sent now, while
the model's lease is held and before anything is changed; raises to end the shift there."""


def unchecked(before: Served | None, live: dict[str, int]) -> None:
    """The check of a shift that a person asked for: it may always happen."""


class Target(Protocol):
    """A place where versions are served: this machine, or KServe."""

    environment: str
    """Its name in the registry."""
    runtime: str

    def exclusive(self, model: str) -> contextlib.AbstractContextManager[None]:
        """Let one shift of a model at a time into the block, or fail."""

    def live(self, model: str) -> dict[str, int]:
        """Percent of the traffic by version, as it is sent now; empty if none is."""

    def make_room(self, model: str, wanted: set[str]) -> bool:
        """Where what is wanted cannot start beside the rest: end the rest first; True if it did.

        From then on until `move`, users of a model of which nothing stays are told to come later.
        """

    def bring_up(self, version: Version) -> ModelServer:
        """Serve a version beside what is served; returns its own server once it is ready."""

    def move(self, model: str, shares: dict[str, int]) -> str:
        """Send traffic by share to versions that are up; at once and whole. Returns the URL."""

    def retire(self, model: str, keep: set[str]) -> None:
        """End the versions that are not kept, once nothing is under way on them."""


def shift(
    target: Target,
    registry: Callable[[Any], Any],
    settings: DeploySettings,
    model: str,
    shares: Mapping[str, int],
    note: Callable[[str], None] = lambda stage: None,
    check: Check = unchecked,
) -> tuple[Served, dict[str, str]]:
    """Bring up the versions that ``shares`` names, test each, move the traffic, tell the registry.

    ``shares`` is percent by version and adds up to 100; ``registry`` runs work of
    `nudge.components.common.clients.registry.releases`; ``check`` raises if this shift must not
    happen any more. Returns what is served now and each version's smoke answer.
    Raises `UserError`; what was served before is then still served (or again, where it had to make
    room), and a version that does not pass is taken away again. Only where the registry fails once
    the traffic has moved is the new one served, which the error says.
    """
    wanted = checked_shares(shares)
    with target.exclusive(model):
        before: Served | None = registry(find_served(model))
        # A shift that was killed may have moved the traffic and not told the registry.
        live = target.live(model)
        check(before, live)
        serving = {*live, *(before.shares if before else ())}
        versions = {name: registry(find_version(model, name)) for name in wanted}
        for version in versions.values():
            if version.archived and version.name not in serving:
                raise UserError(
                    f"{model} {version.name} is archived in the registry; make it LIVE there first"
                )
        answers = {}
        # Until it is known that nothing was ended.
        made_room = True
        try:
            made_room = target.make_room(model, set(wanted))
            for name, version in versions.items():
                note(f"starting {name}")
                server = target.bring_up(version)
                note(f"asking {name}")
                answers[name] = smoke_test(server, version, settings)
            # A model takes minutes to start. A registry that is away by now lets nothing move.
            registry(find_served(model))
        except UserError as error:
            # Said now: what is cleaned up next may take as long as a request.
            note(f"failed: {error}"[:300])
            try:
                target.retire(model, serving)
            except UserError as left:
                raise UserError(f"{error}\nIt could not be cleaned up: {left}") from None
            had = dict.fromkeys(live, 100) if len(live) == 1 else before and before.shares
            if made_room and had:
                _bring_back(target, registry, model, had, error)
            raise
        note("moving the traffic")
        endpoint = target.move(model, wanted)
        history = _history(before, wanted)
        withdrawn = _withdrawn(before, live, {*wanted, *history})
        served = Served(model, endpoint, wanted, history, withdrawn)
        main = versions[served.main]
        try:
            registry(note_served(main, served, target.environment, target.runtime))
            for version in versions.values():
                if version.properties.get(NOT_PROMOTED):
                    registry(note_promotion(version, ""))
        except UserError as error:
            told = " and ".join(wanted)
            raise UserError(
                f"users of {model} meet {told} now, but the registry could not be told: {error}\n"
                "run this again to tell it, or `nudge rollback` to go back"
            ) from None
        note("ending what is not needed")
        target.retire(model, set(wanted))
    return served, answers


def checked_shares(shares: Mapping[str, int]) -> dict[str, int]:
    """The shares that are not 0; raises `UserError` unless they add up to 100."""
    wanted = {name: share for name, share in shares.items() if share}
    if sum(wanted.values()) != 100 or any(share < 0 for share in wanted.values()):
        told = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise UserError(f"the shares {told} do not add up to 100 percent")
    return wanted


def _bring_back(
    target: Target,
    registry: Callable[[Any], Any],
    model: str,
    shares: Mapping[str, int],
    cause: UserError,
) -> None:
    """Serve again what made room for a version that failed; raises `UserError` that says so."""
    told = " and ".join(shares)
    try:
        for name in shares:
            target.bring_up(registry(find_version(model, name)))
        target.move(model, dict(shares))
    except UserError as error:
        raise UserError(
            f"{cause}\n{told} made room for it and does not come back, so nothing is served now: "
            f"{error}"
        ) from None
    raise UserError(f"{cause}\n{told} made room for it and is served again") from None


def _history(before: Served | None, wanted: Mapping[str, int]) -> tuple[str, ...]:
    """The versions that had all the traffic; going back to one forgets those after it."""
    known = before.history if before else ()
    if len(wanted) != 1:
        return known
    (name,) = wanted
    if name in known:
        return known[: known.index(name) + 1]
    return (*known, name)


def _withdrawn(before: Served | None, live: Mapping[str, int], kept: set[str]) -> tuple[str, ...]:
    """The versions from which traffic was taken away for good: neither served nor in the history.

    A version that a newer one replaced is in the history; one from which a rollback went back, or
    that had a share of a split that ended, is not.
    """
    known = (*before.withdrawn, *before.history, *before.shares) if before else ()
    gone = [name for name in dict.fromkeys((*known, *live)) if name not in kept]
    return tuple(gone[-KEPT_HISTORY:])
