"""Approval by a person: a candidate waits, registered, until somebody approves or rejects it.

`Approvals` is where decisions are made and found. On a cluster they are objects that the API server
guards (see `nudge.components.deploy.kserve.approvals`), and the registry has a copy. On one machine
the registry has the only record, and "who" is the account that ran the command.

An approval is for exactly one piece of evidence, and it replaces no check: deploy still admits the
candidate only if the version in traffic is the one that it was compared with.
"""

import datetime
import getpass
import platform
from typing import Any, Protocol

from nudge.components.common.artifacts.approval import (
    Approval,
    State,
    approval_properties,
    evidence_sha256,
    read_approval,
)
from nudge.components.common.artifacts.comparison import compared_with
from nudge.components.common.clients.registry import releases
from nudge.components.common.clients.registry.releases import NOT_PROMOTED, Served, Version
from nudge.components.common.core.errors import UserError

DECISIONS = ("approved", "rejected")


class Approvals(Protocol):
    """Where people's decisions about candidates are kept."""

    def find(self, version: Version) -> Approval | None:
        """The decision about a version and its present evidence; None if nobody decided."""

    def decide(self, version: Version, state: State, reason: str) -> Approval:
        """Record this person's decision; raises `UserError` if there is one already."""


class RegistryApprovals:
    """Decisions in the registry alone, for one machine: its owner is the only person."""

    def find(self, version: Version) -> Approval | None:
        """As in `Approvals`."""
        found = read_approval(version.properties)
        return found if found and found.state in DECISIONS else None

    def decide(self, version: Version, state: State, reason: str) -> Approval:
        """As in `Approvals`; the caller holds the model's lease and writes it to the registry."""
        if decided := self.find(version):
            raise already_decided(version, decided)
        who = f"{getpass.getuser()}@{platform.node()}"
        return Approval(state, who, now(), evidence_of(version), reason)


def evidence_of(version: Version) -> str:
    """The digest of what a decision about this version is about."""
    return evidence_sha256(version.model, version.name, version.uri, version.properties)


def already_decided(version: Version, approval: Approval) -> UserError:
    """The error for a second decision."""
    way_on = "`nudge promote` and `nudge rollback` move traffic by hand"
    if approval.state == "rejected":
        way_on = "the version is archived, and a new run makes a new candidate"
    return UserError(
        f"{version.model} {version.name} was {approval.state} by {approval.by} at {approval.at}; "
        f"a decision is final ({way_on})"
    )


def waits_because(version: Version, approval: Approval | None) -> str:
    """Why a version gets no traffic although it passed the gate; empty if it is approved."""
    title = f"{version.model} {version.name}"
    if approval is None or approval.state == "awaiting":
        return (
            f"awaiting approval; `nudge approve {version.name} --model {version.model}` serves it, "
            f"`nudge reject {version.name} --model {version.model}` archives it"
        )
    if approval.state != "approved":
        return f"{title} was {approval.state} by {approval.by} at {approval.at}"
    if approval.evidence != evidence_of(version):
        return (
            f"{approval.by} approved {title} at {approval.at}, but its evaluation or files have "
            "changed since; run again and approve the new version"
        )
    return ""


def ask_for(version: Version, reason: str) -> dict[str, str | bool]:
    """The custom properties of a version that waits from now on, or has been waiting."""
    known = read_approval(version.properties)
    since = known.at if known and known.state == "awaiting" else now()
    waiting = Approval("awaiting", "", since, evidence_of(version))
    return {"promoted": False, NOT_PROMOTED: reason, **approval_properties(waiting)}


def expired(version: Version, served: Served | None, days: float) -> str:
    """Why nobody can approve a waiting version any more; empty if somebody still can.

    Either it waited for more than ``days`` (0: any time is fine), or the version that it was
    compared with is no longer the only one that is served.
    """
    found = read_approval(version.properties)
    # A person may have promoted it without an approval.
    if found is None or found.state != "awaiting" or version.properties.get("promoted"):
        return ""
    waited = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found.at)
    if days and waited > datetime.timedelta(days=days):
        return f"nobody approved it within {days:g} days (deploy.approval_days)"
    compared = compared_with(version.properties)
    if compared is None or served is None or version.name in served.shares:
        return ""
    if len(served.shares) == 1 and served.main != compared.version:
        then = compared.version or "the base model"
        return f"it was compared with {then}, and {served.main} is served now"
    return ""


def archive_expired(ask: Any, model: str, days: float, keep: str = "") -> list[str]:
    """Archive the candidates that can no longer be approved, except ``keep``; returns their names.

    ``ask`` runs work of a registry client.
    """
    served = ask(releases.find_served(model))
    archived = []
    for version in ask(releases.list_versions(model)):
        why = "" if version.archived or version.name == keep else expired(version, served, days)
        if why:
            close(ask, version, Approval("expired", "", now(), evidence_of(version), why))
            archived.append(version.name)
    return archived


def close(ask: Any, version: Version, approval: Approval) -> None:
    """Record that a version will not be promoted, and archive it."""
    by = f" by {approval.by}" if approval.by else ""
    why = f": {approval.reason}" if approval.reason else ""
    outcome = f"{approval.state}{by} at {approval.at}{why}"
    values: dict[str, str | bool] = {"promoted": False, NOT_PROMOTED: outcome}
    ask(releases.note_properties(version.id, {**values, **approval_properties(approval)}))
    ask(releases.archive(version.id))


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
