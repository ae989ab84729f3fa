"""The step `deploy`: serve and test a registered version, and roll back to an earlier one."""

import contextlib
import os
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
from nudge.components.common.core.environment import in_pipeline_step, nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.step import step
from nudge.components.deploy import approval, canary
from nudge.components.deploy.admission import NotPromoted, why_not
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer
from nudge.components.deploy.traffic import Check, Target, shift, unchecked


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
        decision = _approvals(settings, before).find(current)
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
    on_cluster = _target_name(settings, served) == "kserve"
    # On a cluster the API server accepts one decision, and deploy asks for it under the lease.
    lease = contextlib.nullcontext() if on_cluster else _target(settings, served).exclusive(model)
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
        approvals = _approvals(settings, served)
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
        print(f"candidates that can no longer be approved were not archived: {error}", flush=True)
    else:
        for each in old:
            print(f"archived {each}, which can no longer be approved", flush=True)


def _approvals(settings: DeploySettings, served: Served | None) -> approval.Approvals:
    if _target_name(settings, served) != "kserve":
        return approval.RegistryApprovals()
    from nudge.components.common.clients.kube import connect
    from nudge.components.deploy.kserve.approvals import ClusterApprovals

    return ClusterApprovals(connect(settings.kserve.namespace))


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
        Rollback,
        find_rollback,
        find_served,
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
    back = _way_back(served, set(_target(settings, served).live(model)))
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
            print(f"registered, {outcome}", flush=True)
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
    target = _target(settings, with_registry(url, find_served(model)))
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
    target = _target(settings, with_registry(url, find_served(model)))
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
        "smoke_prompt": settings.smoke_prompt,
        "smoke_answer": answers[served.main],
    }


def _target(settings: DeploySettings, served: Served | None) -> Target:
    if _target_name(settings, served) == "kserve":
        from nudge.components.common.clients.kube import connect
        from nudge.components.deploy.kserve.kserve import KServe

        return KServe(connect(settings.kserve.namespace), settings)
    from nudge.components.deploy.local import host_serving

    if url := os.environ.get(host_serving.URL):
        return host_serving.HostServing(url, os.environ[host_serving.TOKEN], settings)
    from nudge.components.deploy.local.local_serving import LocalServing

    return LocalServing(nudge_home(), settings)


def _target_name(settings: DeploySettings, served: Served | None) -> str:
    """``local`` or ``kserve``; raises `UserError` if the target is local and that cannot work."""
    in_pod = in_pipeline_step()
    elsewhere = served is not None and not served.endpoint.startswith("http://127.0.0.1:")
    if settings.target == "auto":
        return "kserve" if in_pod or elsewhere else "local"
    if settings.target == "local" and in_pod:
        raise UserError(
            "deploy.target is local, but a server that a step starts on a cluster stops with the "
            "step's pod; set deploy.target to kserve, or remove it"
        )
    if settings.target == "local" and served and elsewhere:
        raise UserError(
            f"deploy.target is local, but {served.model} is served at {served.endpoint}, which is "
            "not this machine: its users would stay there while the registry says otherwise; set "
            "the target to kserve, or remove it"
        )
    return settings.target
