"""The gate: equal models seldom pass, better ones do, and a failed check stops a promotion."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from nudge.components.common.artifacts.evaluation import (
    Check,
    GuardResult,
    Incumbent,
    ProbeResult,
    Verdict,
)
from nudge.components.common.artifacts.scores import Score
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.evaluate.checks import guard_checks, loss_checks, probe_checks
from nudge.components.evaluate.gate import compare, paired_bootstrap, verdict
from nudge.components.evaluate.settings import EvaluateSettings

SETTINGS = EvaluateSettings(base_model="unused", resamples=400)
NONE, FOUND = Incumbent("none"), Incumbent("found", version="v1", uri="s3://b/v1")


def documents(gain: float, seed: int, count: int = 60) -> tuple[list[Score], list[Score]]:
    """Base and candidate scores whose nats differ by noise around ``gain`` per byte."""
    generator = np.random.default_rng(seed)
    size = generator.integers(200, 900, count)
    noise = generator.normal(0, 0.02, count)
    base = [Score(float(n), int(n) // 4, int(n), int(n) // 6) for n in size]
    candidate = [
        Score(old.nats - (gain + e) * old.bytes, old.tokens, old.bytes, old.words)
        for old, e in zip(base, noise, strict=True)
    ]
    return base, candidate


def passes(gain: float, seed: int) -> bool:
    return bool(judged(gain, seed).promote)


def judged(
    gain: float,
    seed: int,
    checks: Sequence[Check] = (),
    settings: EvaluateSettings = SETTINGS,
    incumbent: Incumbent = NONE,
    **more: Any,
) -> Verdict:
    base, candidate = documents(gain, seed)
    scores = {"base": base, "candidate": candidate}
    if incumbent.state == "found":
        scores["incumbent"] = more.pop("served")
    return verdict(scores, checks, settings, incumbent, **more)


def test_equal_models_pass_no_more_often_than_the_confidence_level_allows() -> None:
    passed = sum(passes(0.0, seed) for seed in range(400))
    assert (
        passed <= 400 * 0.05
    )  # one side of a 95 % interval is 2.5 %, and some slack for the bootstrap


def test_few_documents_pass_no_more_often_than_twice_the_level() -> None:
    """At the minimum number of documents; with one less, no model passes."""
    passed = 0
    for seed in range(1000):
        base, candidate = documents(0.0, seed, MIN_DOCUMENTS)
        decision = verdict({"base": base, "candidate": candidate}, [], SETTINGS, NONE)
        passed += decision.promote
    assert passed <= 1000 * 2 * 0.025 + 15  # two standard deviations of such a count
    for count in range(1, MIN_DOCUMENTS):
        base, candidate = documents(0.5, count, count)
        decision = verdict({"base": base, "candidate": candidate}, [], SETTINGS, NONE)
        assert (decision.promote, decision.interval) == (False, None)


def test_a_true_gain_passes() -> None:
    assert sum(passes(0.012, seed) for seed in range(100)) >= 95


def test_the_difference_is_exact_and_inside_its_interval() -> None:
    base, candidate = documents(0.1, 3)
    difference, (low, high) = paired_bootstrap(
        base, candidate, resamples=1000, confidence=0.9, seed=1
    )
    nats = sum(new.nats - old.nats for old, new in zip(base, candidate, strict=True))
    assert np.isclose(difference, nats / sum(s.bytes for s in base) / np.log(2))
    assert low < difference < high < 0


def test_a_worse_model_is_not_promoted_and_the_reason_says_so() -> None:
    decision = judged(-0.1, 5)
    assert not decision.promote
    assert "not shown to be better" in decision.reason


def test_a_moved_probe_that_should_hold_stops_a_better_model() -> None:
    probe = ProbeResult(
        prompt="The Pacific", target=" Ocean", expect="hold", limit=0.2, p_before=0.5, p_after=0.1
    )
    checks = probe_checks([probe, dataclasses.replace(probe, expect="rise")])
    assert len(checks) == 1
    decision = judged(0.1, 5, checks)
    assert not decision.promote
    assert "P(' Ocean') after 'The Pacific' went from 0.5 for the base to 0.1" in decision.reason
    assert decision.checks[0].ok is False


def guarded(gain: float, limit: float) -> Verdict:
    """A better model that gains ``gain`` nats per byte on a guard set (negative is worse)."""
    base, candidate = documents(gain, 11)
    compared = compare({"base": base, "candidate": candidate}, SETTINGS)["base"]
    assert compared.interval
    guard = GuardResult(
        name="code", limit=limit, ok=compared.interval[1] <= limit, **vars(compared)
    )
    return judged(0.1, 5, guard_checks([guard]))


def test_a_guard_set_that_gets_worse_past_its_limit_stops_a_better_model() -> None:
    assert guarded(0.0, limit=0.02).promote
    assert guarded(-0.01, limit=0.05).promote  # worse by 0.0144 bits, and 0.05 may be lost
    decision = guarded(-0.1, limit=0.05)
    assert not decision.promote
    assert "better than the base on held-out text, but +0.1" in decision.reason
    assert "bits per byte on code" in decision.reason
    assert "at most +0.0500 is allowed" in decision.reason


def test_a_guard_whose_loss_is_not_ruled_out_stops_too() -> None:
    """The difference is within the limit, but the worse end of its interval is not."""
    decision = guarded(-0.012, limit=0.018)
    message = decision.checks[0].message
    assert -0.012 / np.log(2) < 0.018
    assert not decision.promote, message


def test_a_loss_that_is_not_finite_stops_the_promotion() -> None:
    for wrong in (float("nan"), float("-inf")):
        base, candidate = documents(0.1, 5)
        candidate[3] = Score(wrong, 10, 40, 6)
        of_models = {"base": base, "candidate": candidate}
        checks = loss_checks({"held-out": of_models})
        decision = verdict(of_models, checks, SETTINGS, NONE)
        assert not decision.promote
        assert "the loss of 1 documents of held-out is not a finite number" in decision.reason


def test_the_margin_is_required() -> None:
    strict = EvaluateSettings(base_model="unused", resamples=400, margin=1.0)
    assert not judged(0.1, 5, settings=strict).promote


def test_a_thousand_equal_pairs_and_a_thousand_better_ones() -> None:
    """At most alpha + 1 % of A/A are promoted, and at least 95 % of A/B with a gain of 0.012 nats
    (0.0173 bits) per byte, over 60 documents whose gains scatter by 0.02 nats."""
    alpha = 1 - SETTINGS.confidence
    assert sum(passes(0.0, seed) for seed in range(1000)) <= 1000 * (alpha + 0.01)
    assert sum(passes(0.012, 5000 + seed) for seed in range(1000)) >= 950


def test_an_incumbent_replaces_the_base_model_as_reference() -> None:
    _, better = documents(0.2, 7)
    decision = judged(0.1, 5, incumbent=FOUND, served=better)
    assert (decision.promote, decision.reference) == (False, "incumbent")
    assert "not shown to be better than the version served now (v1)" in decision.reason
    assert (decision.comparisons["base"].interval or (0.0, 0.0))[1] < 0
    _, worse = documents(-0.1, 7)
    assert judged(0.1, 5, incumbent=FOUND, served=worse).promote


def test_a_candidate_that_is_the_served_version_is_not_promoted() -> None:
    _, candidate = documents(0.1, 5)
    decision = judged(0.1, 5, incumbent=FOUND, served=candidate, same=True)
    assert not decision.promote
    assert "(v1), bit for bit" in decision.reason


def test_an_unknown_incumbent_stops_the_promotion() -> None:
    unknown = Incumbent("unknown", why="the registry is on fire")
    decision = judged(0.1, 5, incumbent=unknown)
    assert not decision.promote
    assert "unknown what is served now" in decision.reason
    assert "on fire" in decision.reason


def test_a_tiny_gain_is_not_shown_as_zero() -> None:
    base, _ = documents(0.0, 5)
    better = [dataclasses.replace(each, nats=each.nats * (1 - 1e-6)) for each in base]
    decision = verdict({"base": base, "candidate": better}, [], SETTINGS, NONE)
    assert decision.promote
    assert "bits per byte on held-out text (95% interval" in decision.reason
    assert "0.0000 bits" not in decision.reason
    assert "interval 0.0000 " not in decision.reason
