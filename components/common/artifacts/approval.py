"""A person's decision about a candidate, as custom properties of its version in the registry.

``approval`` is "awaiting", "approved", "rejected" or "expired". ``approval_by`` and ``approval_at``
(UTC, ISO 8601) say who decided and when; for "awaiting", when the wait began. ``approval_evidence``
is the digest of what the person decided about (see `evidence_sha256`), ``approval_reason`` what the
person wrote.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from nudge.components.common.artifacts.comparison import RECORD as COMPARED

State = Literal["awaiting", "approved", "rejected", "expired"]

PREFIX = "approval"
EVIDENCE = ("run_id", "manifest_sha256", "model_sha256", "evaluation_sha256", *COMPARED)
"""The custom properties that a decision is about: the run, the files, the evaluation with its
verdict and report, and the version that the candidate was compared with."""


@dataclass(frozen=True)
class Approval:
    """The state of a candidate's approval."""

    state: State
    by: str = ""
    at: str = ""
    evidence: str = ""
    reason: str = ""


def approval_properties(approval: Approval) -> dict[str, str]:
    """The custom properties of a version."""
    values = asdict(approval)
    state = values.pop("state")
    return {PREFIX: state, **{f"{PREFIX}_{name}": value for name, value in values.items()}}


def read_approval(properties: Mapping[str, Any]) -> Approval | None:
    """The approval in a version's custom properties; None if it needed none."""
    state = properties.get(PREFIX)
    if state not in get_args(State):
        return None
    names = ("by", "at", "evidence", "reason")
    values = {name: str(properties.get(f"{PREFIX}_{name}", "")) for name in names}
    return Approval(cast(State, state), **values)


def evidence_sha256(model: str, version: str, uri: str, properties: Mapping[str, Any]) -> str:
    """Hex sha256 of everything that an approval is about.

    It changes if the version gets other files, another evaluation or another incumbent to compare
    with; an earlier approval then no longer applies.
    """
    about = {name: str(properties.get(name, "")) for name in EVIDENCE}
    text = json.dumps({"model": model, "version": version, "uri": uri, **about}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
