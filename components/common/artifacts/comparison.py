"""What a candidate was compared with: recorded by the evaluation, kept in the registry, checked
by deploy before it moves traffic.

The record is three custom properties of a version: ``incumbent_state`` ("found", "none" or
"unknown"), ``incumbent`` (the version's name; empty unless found) and ``incumbent_traffic`` (JSON:
percent of the traffic by version at the evaluation).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RECORD = STATE, VERSION, TRAFFIC = "incumbent_state", "incumbent", "incumbent_traffic"


@dataclass(frozen=True)
class Compared:
    """The incumbent of an evaluation; ``version`` is empty unless ``state`` is "found"."""

    state: str
    version: str = ""
    shares: dict[str, int] = field(default_factory=dict)
    """Percent of the traffic by version at the evaluation; empty if it was not recorded."""


def comparison_properties(incumbent: Mapping[str, Any] | None) -> dict[str, str]:
    """The custom properties of a version, from the ``incumbent`` of its evaluation.

    Empty for an evaluation without one, which an older nudge wrote.
    """
    if incumbent is None:
        return {}
    found = incumbent["state"] == "found"
    return {
        STATE: str(incumbent["state"]),
        VERSION: str(incumbent["version"]) if found else "",
        TRAFFIC: json.dumps(incumbent.get("shares", {})),
    }


def compared_with(properties: Mapping[str, Any]) -> Compared | None:
    """What the custom properties of a version say; None if an older nudge registered it."""
    if STATE not in properties:
        return None
    shares = json.loads(str(properties.get(TRAFFIC) or "{}"))
    return Compared(str(properties[STATE]), str(properties.get(VERSION, "")), shares)
