"""Decide whether a candidate may take the traffic: only from the version it was compared with.

Between an evaluation and its deploy, another run may deploy, or a person may promote, roll back or
split. The verdict "better than the incumbent" is then about a version that is no longer served.
"""

import json
from collections.abc import Mapping

from nudge.components.common.artifacts.comparison import Compared, compared_with
from nudge.components.common.clients.registry.releases import Served, Version

CANARY_PLAN = "canary_plan"
"""The custom property of a version that names the incumbent and the shares of its canary."""


class NotPromoted(Exception):
    """The candidate stays registered and gets no traffic; the text gives the reason.

    ``before`` and ``live`` describe the current traffic, as in `why_not`; ``awaiting`` says that
    only a person's approval is missing.
    """

    def __init__(
        self, reason: str, before: Served | None, live: dict[str, int], awaiting: bool = False
    ) -> None:
        super().__init__(reason)
        self.before, self.live, self.awaiting = before, live, awaiting


def why_not(version: Version, before: Served | None, live: Mapping[str, int]) -> str:
    """The reason why a candidate must not take the traffic; empty if it may.

    ``before`` is the registry's record of what is served; ``live`` is the percent of the traffic by
    version that the target sends now. ``live`` takes precedence, because a killed deploy may have
    moved the traffic without recording it. Read both while holding the model's lease.

    A candidate that already has all the traffic may take it, so that an interrupted deploy can be
    repeated. A version that an older nudge registered has no record of what it was compared with,
    and is admitted as it was then.
    """
    compared = compared_with(version.properties)
    traffic = dict(live) or dict(before.shares if before else {})
    if compared is None or set(traffic) == {version.name}:
        return ""
    by_hand = f"`nudge promote {version.name} --model {version.model}` gives it the traffic anyway"
    if before and _was_withdrawn(version.name, before, live):
        return f"{version.name} had traffic before, and it was withdrawn; {by_hand}"
    if _in_canary(version, before, live, compared):
        return ""
    expected = {compared.version} if compared.state == "found" else set()
    if compared.state in ("found", "none") and set(traffic) == expected:
        return ""
    now = _now(traffic, compared)
    if live and before and set(live) != set(before.shares):
        now += f" (the registry still says {_listed(before.shares)}: that move was interrupted)"
    remedy = f"run again to compare with {_main(traffic)}" if traffic else "run again"
    if len(traffic) > 1:
        remedy = "end the split (`nudge promote` or `nudge rollback`) and run again"
    return f"{version.name} was compared with {_then(compared)}, but {now}; {remedy}, or {by_hand}"


def _was_withdrawn(name: str, before: Served, live: Mapping[str, int]) -> bool:
    """Whether a version had traffic and someone moved it away on purpose."""
    # A move that was interrupted before it was recorded counts too.
    unrecorded = bool(live) and name in before.shares and name not in live
    return name in before.withdrawn or unrecorded


def _in_canary(
    version: Version, before: Served | None, live: Mapping[str, int], compared: Compared
) -> bool:
    """Whether the traffic is what this version's own canary, which was interrupted, left behind."""
    plan = json.loads(str(version.properties.get(CANARY_PLAN) or "{}"))
    share = live.get(version.name, 0)
    ours = plan.get("incumbent") == compared.version and share in plan.get("shares", [])
    if not ours or live != {compared.version: 100 - share, version.name: share}:
        return False
    if before is None:
        return False
    # The last recorded move is the canary's, or its first move was not recorded.
    first = before.shares == {compared.version: 100} and live != before.shares
    return before.canary == version.name or first


def _then(compared: Compared) -> str:
    if compared.state == "found":
        return compared.version
    if compared.state == "none":
        return "the base model, because no version was served then"
    return "the base model, because the incumbent was unknown then"


def _now(traffic: Mapping[str, int], compared: Compared) -> str:
    if not traffic:
        return "no version is served now"
    if len(traffic) > 1:
        since = "still" if traffic == compared.shares else "now"
        return f"the traffic is {since} split between {_listed(traffic)}"
    return f"{_main(traffic)} has the traffic now"


def _listed(shares: Mapping[str, int]) -> str:
    if len(shares) == 1:
        return _main(shares)
    return " and ".join(f"{name} ({share} %)" for name, share in shares.items())


def _main(shares: Mapping[str, int]) -> str:
    return max(shares, key=lambda name: shares[name])
