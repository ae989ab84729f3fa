"""The step `deploy`: serve and test a registered version, and roll back to an earlier one."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nudge.components.common.artifacts.approval import (
    Approval,
    State,
    approval_properties,
    read_approval,
)
from nudge.components.common.clients.registry.releases import NOT_PROMOTED, Served
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.say import say
from nudge.components.common.core.step import step
from nudge.components.deploy import approval, canary, targets
from nudge.components.deploy.admission import NotPromoted, why_not
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer
from nudge.components.deploy.traffic import Check, shift, unchecked
from nudge.components.deploy.way_back import still_before, unmoved, version_before


@step("deploy", reuse=False)
def deploy(settings: DeploySettings, *, registered_model: str, version: str) -> dict[str, Any]:
    """Give a registered version all of the model's traffic, and record that in the registry.

    The new server starts next to the old one and is tested. Only then does the traffic move; the
    old server stops when it has no request in flight. Raises `UserError` with the end of the
    server's log or the answer to the smoke test; the previous versions are then still served.

    If the version that this one was compared with no longer has the traffic (see `why_not`),
    nothing changes: the result has ``promoted: False`` and the reason, and the registry stores both
    as custom properties of the version.
    """
    check = admitted(settings, registered_model, version)
    result = _serve_in_step(settings, registered_model, version, check, candidate=True)
    if settings.approval == "required":
        _archive_expired(settings, registered_model, version)
    return result


@step("deploy", reuse=False)
def serve_approved(
    settings: DeploySettings, *, registered_model: str, version: str
) -> dict[str, Any]:
    """Deploy a version that a person approved; raises `UserError` if it must not get the traffic.

    The checks are those of `deploy`: an approval does not replace them.
    """
    with approved(settings, registered_model, version) as check:
        result = _serve_in_step(settings, registered_model, version, check, candidate=True)
        if not result["promoted"]:
            raise NotPromoted(result["reason"], None, result["shares"])
    return result


@contextlib.contextmanager
def approved(settings: DeploySettings, model: str, version: str) -> Iterator[Check]:
    """The check of `admitted` for a version that must be approved, for the block that deploys it.

    In the block a refusal is a `UserError`. After it, candidates that can no longer be approved are
    archived.
    """
    try:
        yield admitted(replace(settings, approval="required"), model, version)
    except NotPromoted as refused:
        raise UserError(f"{model} {version} is not served: {refused}") from None
    _archive_expired(settings, model, version)


def admitted(settings: DeploySettings, model: str, version: str) -> Check:
    """The check for a candidate's deploy: raises `NotPromoted`, and the registry has the reason.

    A candidate needs the version that it was compared with in traffic and, with
    ``approval: required``, a person's approval of exactly this evaluation.
    """
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.clients.registry.releases import (
        find_version,
        note_promotion,
        note_properties,
    )

    url = registry_url(settings.registry_url)
    candidate = with_registry(url, find_version(model, version))

    # What it records, it records under the lease: a person's promote is either before or after it.
    def check(before: Served | None, live: dict[str, int]) -> None:
        if reason := why_not(candidate, before, live):
            with_registry(url, note_promotion(candidate, reason))
            raise NotPromoted(reason, before, live)
        if settings.approval == "none" or set(live) == {version}:
            return
        current = with_registry(url, find_version(model, version))
        decision = targets.find_approvals(settings, before).find(current)
        if reason := approval.waits_because(current, decision):
            awaiting = decision is None
            note = approval.ask_for(current, reason) if awaiting else {NOT_PROMOTED: reason}
            with_registry(url, note_properties(current.id, note))
            raise NotPromoted(reason, before, live, awaiting)
        if decision:
            with_registry(url, note_properties(current.id, approval_properties(decision)))

    return check


def decide(
    settings: DeploySettings, model: str, version: str, state: State, reason: str = ""
) -> Approval:
    """Record this person's decision about a version that awaits approval; "rejected" archives it.

    Repeating a decision is harmless. Raises `UserError` if the version does not wait, if somebody
    decided otherwise, or if it waited for too long.
    """
    from nudge.components.common.clients.registry import releases
    from nudge.components.common.clients.registry.connection import registry_url, with_registry

    url = registry_url(settings.registry_url)

    def ask(work: Any) -> Any:
        return with_registry(url, work)

    served = ask(releases.find_served(model))
    lease: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    # On a cluster the API server accepts one decision, and deploy asks for it under the lease.
    if targets.target_name(settings, served) == "local":
        lease = targets.find_target(settings, served).exclusive(model)
    with lease:
        found = ask(releases.find_version(model, version))
        if read_approval(found.properties) is None:
            raise UserError(
                f"{model} {version} does not await approval; `nudge promote {version} --model "
                f"{model}` gives it the traffic"
            )
        if why := approval.expired(found, served, settings.approval_days):
            evidence = approval.evidence_of(found)
            approval.close(ask, found, Approval("expired", "", approval.now(), evidence, why))
            raise UserError(f"{model} {version} is archived now: {why}; run again")
        approvals = targets.find_approvals(settings, served)
        decision = approvals.find(found)
        if decision is None or decision.state != state:
            decision = approvals.decide(found, state, reason)
        if state == "rejected":
            approval.close(ask, found, decision)
        else:
            ask(releases.note_properties(found.id, approval_properties(decision)))
    return decision


def _archive_expired(settings: DeploySettings, model: str, version: str) -> None:
    from nudge.components.common.clients.registry.connection import registry_url, with_registry

    url = registry_url(settings.registry_url)
    try:
        old = approval.archive_expired(
            lambda work: with_registry(url, work), model, settings.approval_days, keep=version
        )
    except UserError as error:  # this deploy is complete, and the next one archives them
        say(f"candidates that can no longer be approved were not archived: {error}", stdout=True)
    else:
        for each in old:
            say(f"archived {each}, which can no longer be approved", stdout=True)


@step("rollback", reuse=False)
def rollback(
    settings: DeploySettings, *, registered_model: str, version: str = ""
) -> dict[str, Any]:
    """Return all traffic to the version that had it before, or to ``version``.

    A run that repeats the step returns to the same version again. Raises `UserError` if there is no
    version to return to.
    """
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.clients.registry.releases import (
        find_served,
    )
    from nudge.components.common.clients.registry.rollbacks import (
        Rollback,
        find_rollback,
        note_rollback,
    )
    from nudge.components.common.core.provenance import this_run

    if version:
        return _serve_in_step(settings, registered_model, version)
    url, run_id = registry_url(settings.registry_url), this_run("")
    decided = with_registry(url, find_rollback(registered_model, run_id)) if run_id else None
    if decided is not None:
        check = unmoved(decided.shares, {decided.version: 100})
        return _serve_in_step(settings, registered_model, decided.version, check)
    served = with_registry(url, find_served(registered_model))
    version = version_before(settings, registered_model, served)

    def check_and_note(before: Served | None, live: dict[str, int]) -> None:
        still_before(version)(before, live)
        if run_id:
            # Once the traffic has moved, the way back leads one version further.
            with_registry(url, note_rollback(registered_model, Rollback(run_id, version, live)))

    return _serve_in_step(settings, registered_model, version, check_and_note)


def _serve_in_step(
    settings: DeploySettings,
    model: str,
    version: str,
    check: Check = unchecked,
    candidate: bool = False,
) -> dict[str, Any]:
    from nudge.components.common.core.progress import progress

    total = None if candidate and settings.canary else 4
    with progress("deploy", total=total, unit="stages") as bar:

        def note(stage: str) -> None:
            bar.advance(1, stage=stage)

        try:
            if candidate:
                result = serve_candidate(settings, model, version, check, note)
            else:
                result = serve(settings, model, {version: 100}, note, check)
        except NotPromoted as refused:
            reason = str(refused)
            outcome = reason if refused.awaiting else f"not promoted: {reason}"
            say(f"registered, {outcome}", stdout=True)
            return {
                "promoted": False,
                "awaiting_approval": refused.awaiting,
                "reason": reason,
                "endpoint": refused.before.endpoint if refused.before else "",
                "served_model": model,
                "version": version,
                "shares": refused.live or (refused.before.shares if refused.before else {}),
            }
    return {"promoted": True, **result}


def serve_candidate(
    settings: DeploySettings,
    model: str,
    version: str,
    check: Check,
    note: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Give a candidate all of the traffic unless ``check`` raises, with a canary if the settings
    ask for one.

    Returns what `serve` does, and ``canary``: what was measured at each share. Raises `NotPromoted`
    if the canary goes back.
    """
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.clients.registry.releases import (
        find_served,
        find_version,
        note_properties,
    )

    if not settings.canary:
        return serve(settings, model, {version: 100}, note, check)
    url = registry_url(settings.registry_url)
    target = targets.find_target(settings, with_registry(url, find_served(model)))
    version_id = with_registry(url, find_version(model, version)).id

    def move(shares: dict[str, int], check: Check, servers: dict[str, Any]) -> dict[str, Any]:
        return serve(settings, model, shares, note, check, canary=version, servers=servers)

    world = canary.World(
        live=lambda: target.live(model),
        counts=lambda name: target.counts(model, name),
        move=move,
        version=lambda name: with_registry(url, find_version(model, name)),
        record=lambda values: with_registry(url, note_properties(version_id, values)),
        note=note,
    )
    return canary.run(settings, version, check, world)


def serve(
    settings: DeploySettings,
    model: str,
    shares: dict[str, int],
    note: Callable[[str], None] = lambda stage: None,
    check: Check = unchecked,
    canary: str = "",
    servers: dict[str, ModelServer] | None = None,
) -> dict[str, Any]:
    """Shift a model's traffic to ``shares`` (percent by version), unless ``check`` raises.

    A shift that a person asks for needs no check; ``canary`` and ``servers`` are those of `shift`.
    Returns endpoint, served_model, version (the one with the largest share), shares, smoke_prompt
    and smoke_answer.
    """
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.clients.registry.releases import find_served

    url = registry_url(settings.registry_url)
    target = targets.find_target(settings, with_registry(url, find_served(model)))
    served, answers = shift(
        target,
        lambda work: with_registry(url, work),
        settings,
        model,
        shares,
        note,
        check,
        canary,
        servers,
    )
    return {
        "endpoint": served.endpoint,
        "served_model": model,
        "version": served.main,
        "shares": served.shares,
        "smoke_prompt": answers[served.main].prompt,
        "smoke_answer": answers[served.main].text,
    }
