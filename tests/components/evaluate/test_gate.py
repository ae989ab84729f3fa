"""The gate: equal models seldom pass, better ones do, and what must hold is held."""

from typing import Any

import numpy as np
from nudge.components.evaluate.gate import paired_bootstrap, verdict
from nudge.components.evaluate.perplexity import Score
from nudge.components.evaluate.settings import EvaluateSettings

SETTINGS = EvaluateSettings(base_model="unused", resamples=400)


def documents(gain: float, seed: int, count: int = 60) -> tuple[list[Score], list[Score]]:
    """Base and candidate scores whose nats differ by noise around ``gain`` a byte."""
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
    return bool(verdict(*documents(gain, seed), [], SETTINGS)["promote"])


def test_equal_models_pass_no_more_often_than_the_level_says() -> None:
    passed = sum(passes(0.0, seed) for seed in range(400))
    assert passed <= 400 * 0.05  # one side of a 95 % interval is 2.5 %, and the bootstrap's slack


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
    decision = verdict(*documents(-0.1, 5), [], SETTINGS)
    assert not decision["promote"]
    assert "not shown to be better" in decision["reason"]


def test_a_moved_guard_probe_stops_a_better_model() -> None:
    probe: dict[str, Any] = {"prompt": "The Pacific", "expect": "hold", "ok": False}
    decision = verdict(*documents(0.1, 5), [probe], SETTINGS)
    assert not decision["promote"]
    assert "The Pacific" in decision["reason"]


def test_the_margin_is_asked_for() -> None:
    strict = EvaluateSettings(base_model="unused", resamples=400, margin=1.0)
    assert not verdict(*documents(0.1, 5), [], strict)["promote"]
