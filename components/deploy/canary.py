"""A canary: the candidate gets the traffic in steps, and loses it again if it serves worse.

Each step is a shift of its own (see `nudge.components.deploy.traffic`), so that a person can move
the traffic between two steps: the lease is free while the canary observes. Each shift happens only
if the traffic is still as the step before left it.

The intent is recorded before the first step: the version's custom property ``canary_plan`` names
the incumbent and the shares. A deploy that was killed between two steps can therefore be repeated.
It continues at the share that the candidate has.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from nudge.components.common.clients.registry.releases import NOT_PROMOTED, Served, Version
from nudge.components.deploy.admission import CANARY_PLAN, NotPromoted
from nudge.components.deploy.measure import Counts, Measured, Probe, prompts_of
from nudge.components.deploy.settings import CanaryLimits, DeploySettings
from nudge.components.deploy.smoke import ModelServer, smoke_prompt
from nudge.components.deploy.traffic import Check

REPORT = "canary"
"""The custom property of a version that has the measurements of its canary."""
ENOUGH = 5
"""Requests to each version that a judgement needs."""
PATIENCE = 3
"""How many times the duration a step may take until each version has answered `ENOUGH`."""
NOISE_S = 0.05
"""A difference in time to first token that nobody notices, whatever the limit."""
POLL_S = 0.5


class Move(Protocol):
    """Shifts the traffic to ``shares`` unless ``check`` raises; see `deploy.serve`."""

    def __call__(
        self, shares: dict[str, int], check: Check, servers: dict[str, ModelServer]
    ) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class World:
    """What a canary acts on."""

    live: Callable[[], dict[str, int]]
    counts: Callable[[str], Counts | None]
    move: Move
    version: Callable[[str], Version]
    record: Callable[[dict[str, str | bool]], None]
    """Sets custom properties of the candidate."""
    note: Callable[[str], None]


def plan(settings: DeploySettings, version: str, live: Mapping[str, int]) -> list[dict[str, int]]:
    """The shares of each step that is still due, from the traffic now.

    Without an incumbent, or if the candidate has all the traffic, that is one step to 100 percent.
    """
    others = [name for name in live if name != version]
    if len(others) != 1:
        return [{version: 100}]
    (incumbent,) = others
    steps = [{incumbent: 100 - share, version: share} for share in settings.canary if share < 100]
    steps.append({version: 100})
    # A killed canary continues with the step that it had begun.
    return steps[steps.index(dict(live)) :] if dict(live) in steps else steps


def run(settings: DeploySettings, version: str, admitted: Check, world: World) -> dict[str, Any]:
    """Give ``version`` the traffic step by step; returns the last shift's result and the report.

    Raises `NotPromoted` if ``admitted`` does, if the candidate serves worse than the limits allow
    (the incumbent then has all the traffic again), or if someone else moved the traffic meanwhile.
    """
    while True:
        try:
            return _run(settings, version, admitted, world, world.live())
        except _MovedMeanwhile:  # plan again for the traffic as it is now
            continue


class _MovedMeanwhile(Exception):
    """The traffic moved between the plan of a canary and its first shift."""


def _run(
    settings: DeploySettings, version: str, admitted: Check, world: World, live: dict[str, int]
) -> dict[str, Any]:
    steps = plan(settings, version, live)
    report: list[dict[str, Any]] = []

    def begin(before: Served | None, now: dict[str, int]) -> None:
        admitted(before, now)
        if now != live:
            raise _MovedMeanwhile
        if len(steps) > 1:
            incumbent = next(name for name in steps[0] if name != version)
            intent = {"incumbent": incumbent, "shares": settings.canary}
            world.record({CANARY_PLAN: json.dumps(intent)})

    result: dict[str, Any] = {}
    check: Check = begin
    for shares in steps:
        servers: dict[str, ModelServer] = {}
        result = world.move(shares, check, servers)
        if shares[version] == 100:
            break
        check = _still(shares, version, world)
        incumbent = next(name for name in shares if name != version)
        world.note(f"observing {version} at {shares[version]} %")
        both = _observe(settings, {version: servers[version], incumbent: servers[incumbent]}, world)
        problems = worse(both[version], both[incumbent], settings.canary_limits)
        report.append(
            {
                "share": shares[version],
                "candidate": dataclasses.asdict(both[version]),
                "incumbent": dataclasses.asdict(both[incumbent]),
                "problems": problems,
            }
        )
        world.record({REPORT: json.dumps(report)})
        if problems:
            _go_back(version, incumbent, shares, problems, world)
    return {**result, "canary": report}


def worse(candidate: Measured, incumbent: Measured, limits: CanaryLimits) -> list[str]:
    """What the candidate does worse than the limits allow, each as a clause."""
    found = []
    if candidate.requests < ENOUGH and 2 * candidate.requests < incumbent.requests:
        found.append(
            f"it finished {candidate.requests} requests while the incumbent finished "
            f"{incumbent.requests}"
        )
    if candidate.error_rate > incumbent.error_rate + limits.error_rate:
        found.append(
            f"{candidate.error_rate:.1%} of its requests failed, {incumbent.error_rate:.1%} of the "
            f"incumbent's (limit +{limits.error_rate:.1%})"
        )
    mine, other = candidate.first_token_s, incumbent.first_token_s
    if mine and other and mine > max(other * (1 + limits.first_token), other + NOISE_S):
        found.append(
            f"its first token takes {mine:.2f} s, the incumbent's {other:.2f} s "
            f"(limit +{limits.first_token:.0%})"
        )
    mine, other = candidate.tokens_per_s, incumbent.tokens_per_s
    if mine and other and mine < other * (1 - limits.tokens_per_s):
        found.append(
            f"it writes {mine:.1f} tokens/s, the incumbent {other:.1f} "
            f"(limit -{limits.tokens_per_s:.0%})"
        )
    if candidate.answers and incumbent.answers:
        mine, other = (each.right / each.answers for each in (candidate, incumbent))
        if mine < other - limits.answers:
            found.append(
                f"{mine:.0%} of its probe answers are as evaluated, {other:.0%} of the incumbent's "
                f"(limit -{limits.answers:.0%})"
            )
    return found


def _observe(
    settings: DeploySettings, servers: dict[str, ModelServer], world: World
) -> dict[str, Measured]:
    """Measure both versions over the same period; a candidate that mostly fails ends it early."""
    versions = {name: world.version(name) for name in servers}
    first, *_ = versions.values()
    prompts = prompts_of(smoke_prompt(settings, first), list(versions.values()))
    before = {name: world.counts(name) for name in servers}
    started = time.monotonic()
    candidate, incumbent = (
        Probe(server, versions[name], prompts, settings.smoke_tokens)
        for name, server in servers.items()
    )
    with candidate, incumbent:
        while True:
            time.sleep(POLL_S)
            passed = time.monotonic() - started
            enough = min(candidate.finished, incumbent.finished) >= ENOUGH
            if passed >= settings.canary_duration_s * (1 if enough else PATIENCE):
                break
            now = candidate.measured()
            if enough and now.error_rate > max(0.5, incumbent.measured().error_rate):
                break
    users = {name: _difference(before[name], world.counts(name)) for name in servers}
    return {
        probe.version.name: probe.measured(users[probe.version.name])
        for probe in (candidate, incumbent)
    }


def _difference(before: Counts | None, after: Counts | None) -> Counts | None:
    if before is None or after is None or after.requests < before.requests:  # it was restarted
        return None
    return Counts(after.requests - before.requests, after.errors - before.errors)


def _still(shares: dict[str, int], version: str, world: World) -> Check:
    """A check for a shift of the canary: the traffic is as the step before left it."""

    def check(before: Served | None, live: dict[str, int]) -> None:
        if live == shares and before and before.canary == version:
            return
        now = " and ".join(f"{name} ({share} %)" for name, share in live.items()) or "no version"
        reason = f"the canary of {version} ended because the traffic was moved by hand to {now}"
        world.record({"promoted": False, NOT_PROMOTED: reason})
        raise NotPromoted(reason, before, live)

    return check


def _go_back(
    version: str, incumbent: str, shares: dict[str, int], problems: list[str], world: World
) -> None:
    """Return all traffic to the incumbent and raise `NotPromoted` with what was worse."""
    reason = f"the canary went back to {incumbent} at {shares[version]} %: {'; '.join(problems)}"
    world.note(f"going back to {incumbent}")
    back = {incumbent: 100}
    world.move(back, _still(shares, version, world), {})
    world.record({"promoted": False, NOT_PROMOTED: reason})
    raise NotPromoted(reason, None, back)
