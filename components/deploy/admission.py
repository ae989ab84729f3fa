"""Whether a candidate may take the traffic now: only from the version that it was compared with.

Between an evaluation and its deploy another run may deploy, and a person may promote, roll back or
split. The verdict "better than what is served" is then about a version that is not served any more.
"""

from collections.abc import Mapping

from nudge.components.common.artifacts.comparison import Compared, compared_with
from nudge.components.common.clients.registry.releases import Served, Version


class NotPromoted(Exception):
    """The candidate stays registered and gets no traffic; the text says why.

    ``before`` and ``live`` are what is served then, as in `why_not`.
    """

    def __init__(self, reason: str, before: Served | None, live: dict[str, int]) -> None:
        super().__init__(reason)
        self.before, self.live = before, live


def why_not(version: Version, before: Served | None, live: Mapping[str, int]) -> str:
    """Why a candidate must not take the traffic; empty if it may.

    ``before`` is what the registry says is served, ``live`` the percent of the traffic by version
    that the target sends now, which is believed first: a deploy that was killed may have moved it
    and not recorded it. Both must be read while the model's lease is held.

    A candidate that has all the traffic may take it again: a deploy that was cut off is repeated.
    A version that an older nudge registered does not say what it was compared with, and is let
    through as it was then.
    """
    compared = compared_with(version.properties)
    traffic = dict(live) or dict(before.shares if before else {})
    if compared is None or set(traffic) == {version.name}:
        return ""
    by_hand = f"`nudge promote {version.name} --model {version.model}` gives it the traffic anyway"
    if before and _taken_away(version.name, before, live):
        return f"{version.name} had traffic before, which was then taken away from it; {by_hand}"
    expected = {compared.version} if compared.state == "found" else set()
    if compared.state in ("found", "none") and set(traffic) == expected:
        return ""
    now = _now(traffic, compared)
    if live and before and set(live) != set(before.shares):
        now += f" (the registry still says {_told(before.shares)}: that move was cut off)"
    again = f"run again to compare with {_main(traffic)}" if traffic else "run again"
    if len(traffic) > 1:
        again = "end the split (`nudge promote` or `nudge rollback`) and run again"
    return f"{version.name} was compared with {_then(compared)}, but {now}; {again}, or {by_hand}"


def _taken_away(name: str, before: Served, live: Mapping[str, int]) -> bool:
    """Whether a version had traffic and has none because somebody moved it away on purpose."""
    cut_off = bool(live) and name in before.shares and name not in live  # before it was recorded
    return name in before.withdrawn or cut_off


def _then(compared: Compared) -> str:
    if compared.state == "found":
        return compared.version
    if compared.state == "none":
        return "the base model, because nothing was served then"
    return "the base model, because it was not known what was served then"


def _now(traffic: Mapping[str, int], compared: Compared) -> str:
    if not traffic:
        return "nothing is served now"
    if len(traffic) > 1:
        since = "still" if traffic == compared.shares else "now"
        return f"the traffic is {since} shared between {_told(traffic)}"
    return f"{_main(traffic)} has the traffic now"


def _told(shares: Mapping[str, int]) -> str:
    if len(shares) == 1:
        return _main(shares)
    return " and ".join(f"{name} ({share} %)" for name, share in shares.items())


def _main(shares: Mapping[str, int]) -> str:
    return max(shares, key=lambda name: shares[name])
