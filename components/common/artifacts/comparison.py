"""The incumbent that a candidate was compared with: found by the evaluation, kept in the registry,
checked by deploy before it moves traffic.

The record is three custom properties of a version: ``incumbent_state`` ("found", "none" or
"unknown"), ``incumbent`` (the version's name; empty unless found) and ``incumbent_traffic`` (JSON:
percent of the traffic by version at the evaluation).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nudge.components.common.artifacts.evaluation import Incumbent

RECORD = STATE, VERSION, TRAFFIC = "incumbent_state", "incumbent", "incumbent_traffic"


@dataclass(frozen=True)
class Compared:
    """The incumbent of an evaluation; ``version`` is empty unless ``state`` is "found"."""

    state: str
    version: str = ""
    shares: dict[str, int] = field(default_factory=dict)
    """Percent of the traffic by version at the evaluation; empty if unrecorded."""


def comparison_properties(incumbent: Incumbent | None) -> dict[str, str]:
    """The custom properties of a version, from the ``incumbent`` of its evaluation.

    None, in an evaluation that an older nudge wrote, gives no properties.
    """
    if incumbent is None:
        return {}
    return {
        STATE: incumbent.state,
        VERSION: incumbent.version if incumbent.state == "found" else "",
        TRAFFIC: json.dumps(incumbent.shares),
    }


def compared_with(properties: Mapping[str, Any]) -> Compared | None:
    """The incumbent in a version's custom properties; None if an older nudge registered it."""
    if STATE not in properties:
        return None
    shares = json.loads(str(properties.get(TRAFFIC) or "{}"))
    return Compared(str(properties[STATE]), str(properties.get(VERSION, "")), shares)
