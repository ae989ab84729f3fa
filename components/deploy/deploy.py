"""The step `deploy`: serve and test a registered version, and roll back to an earlier one."""

import os
from collections.abc import Callable
from typing import Any

from nudge.components.common.clients.registry.releases import Served
from nudge.components.common.core.environment import in_pipeline_step, nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.step import step
from nudge.components.deploy.admission import NotPromoted, why_not
from nudge.components.deploy.settings import DeploySettings
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
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.clients.registry.releases import find_version, note_promotion

    url = registry_url(settings.registry_url)
    candidate = with_registry(url, find_version(registered_model, version))

    def check(before: Served | None, live: dict[str, int]) -> None:
        if reason := why_not(candidate, before, live):
            # Recorded under the lease, so a person's promote is either before or after it.
            with_registry(url, note_promotion(candidate, reason))
            raise NotPromoted(reason, before, live)

    return _serve_in_step(settings, registered_model, version, check)


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
    settings: DeploySettings, model: str, version: str, check: Check = unchecked
) -> dict[str, Any]:
    from nudge.components.common.core.progress import progress

    with progress("deploy", total=4, unit="stages") as bar:

        def note(stage: str) -> None:
            bar.advance(1, stage=stage)

        try:
            result = serve(settings, model, {version: 100}, note, check)
        except NotPromoted as refused:
            print(f"registered, not promoted: {refused}", flush=True)
            return {
                "promoted": False,
                "reason": str(refused),
                "endpoint": refused.before.endpoint if refused.before else "",
                "served_model": model,
                "version": version,
                "shares": refused.live or (refused.before.shares if refused.before else {}),
            }
    return {"promoted": True, **result}


def serve(
    settings: DeploySettings,
    model: str,
    shares: dict[str, int],
    note: Callable[[str], None] = lambda stage: None,
    check: Check = unchecked,
) -> dict[str, Any]:
    """Shift a model's traffic to ``shares`` (percent by version), unless ``check`` raises.

    A shift that a person asks for needs no check. Returns endpoint, served_model, version (the one
    with the largest share), shares, smoke_prompt and smoke_answer.
    """
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.clients.registry.releases import find_served

    url = registry_url(settings.registry_url)
    target = _target(settings, with_registry(url, find_served(model)))
    served, answers = shift(
        target, lambda work: with_registry(url, work), settings, model, shares, note, check
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
