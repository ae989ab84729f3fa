"""Where a rollback leads, and checks that the traffic has not moved since that was decided."""

from nudge.components.common.clients.registry.releases import Served
from nudge.components.common.core.errors import UserError
from nudge.components.deploy import targets
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.traffic import Check


class Moved(UserError):
    """The traffic has changed since this shift was decided."""


def unmoved(*shares: dict[str, int]) -> Check:
    """A check for `shift`: raises `Moved` unless the traffic is still split as one of these."""

    def check(before: Served | None, live: dict[str, int]) -> None:
        if live not in shares:
            raise Moved("another run or command has moved the traffic meanwhile")

    return check


def still_before(version: str) -> Check:
    """A check for `shift`: raises `Moved` unless a rollback still leads to ``version``."""

    def check(before: Served | None, live: dict[str, int]) -> None:
        if before is None or _way_back(before, set(live)) != version:
            raise Moved(
                "another run or command has moved the traffic meanwhile, so a rollback no longer "
                f"leads to {version}; look at `nudge models` and roll back again"
            )

    return check


def version_before(settings: DeploySettings, model: str, served: Served | None) -> str:
    """The version that a rollback goes to; raises `UserError` if there is none."""
    if served is None:
        raise UserError(f"no version of {model} is served, so there is nothing to roll back")
    back = _way_back(served, set(targets.find_target(settings, served).live(model)))
    if back is None:
        raise UserError(
            f"{model} {served.main} is the first version that was served; name the version to "
            "return to"
        )
    return back


def _way_back(served: Served, live: set[str]) -> str | None:
    # First undo a move that was not recorded in the registry. A split returns to its main version;
    # a version with all the traffic, to the one before it.
    unrecorded = bool(live) and live != set(served.shares)
    return served.main if unrecorded or len(served.shares) > 1 else served.before
