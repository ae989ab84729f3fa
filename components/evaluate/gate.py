"""The gate: is the candidate better, beyond what the choice of held-out documents explains?"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from nudge.components.evaluate.perplexity import Score
from nudge.components.evaluate.settings import EvaluateSettings

CHUNK = 256
"""Resamples drawn at a time, which bounds memory whatever the number of documents."""


def paired_bootstrap(
    base: Sequence[Score],
    candidate: Sequence[Score],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[float, tuple[float, float]]:
    """Difference in bits per byte (candidate less base; below 0 is better) and its interval.

    Documents are drawn with replacement and both models scored on the same draw; the interval is
    the percentile one (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """
    pairs = zip(base, candidate, strict=True)
    gain = np.array([new.nats - old.nats for old, new in pairs]) / math.log(2)
    size = np.array([score.bytes for score in base], dtype=np.float64)
    generator = np.random.default_rng(seed)
    draws: list[np.ndarray] = []
    for first in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - first)
        chosen = generator.integers(0, len(size), (count, len(size)))
        draws.append(gain[chosen].sum(axis=1) / size[chosen].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return float(gain.sum() / size.sum()), (float(low), float(high))


def verdict(
    base: Sequence[Score],
    candidate: Sequence[Score],
    probes: Sequence[dict[str, Any]],
    settings: EvaluateSettings,
) -> dict[str, Any]:
    """Promote only if the whole interval is better by the margin and every ``hold`` probe held."""
    difference, interval = paired_bootstrap(
        base,
        candidate,
        resamples=settings.resamples,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    moved = [probe["prompt"] for probe in probes if probe["expect"] == "hold" and not probe["ok"]]
    better = interval[1] < -settings.margin
    if not better:
        reason = (
            f"not shown to be better: the {settings.confidence:.0%} interval of the difference, "
            f"{interval[0]:+.4f} to {interval[1]:+.4f} bits per byte, "
            f"does not lie below {-settings.margin:+.4f}"
        )
    elif moved:
        reason = (
            f"better on held-out text, but what should hold has moved by more than "
            f"{settings.hold_limit:.0%}: " + "; ".join(moved)
        )
    else:
        reason = (
            f"better by {-difference:.4f} bits per byte on held-out text "
            f"({settings.confidence:.0%} interval {-interval[1]:.4f} to {-interval[0]:.4f})"
        )
    return {
        "promote": better and not moved,
        "reason": reason,
        "difference_bits_per_byte": difference,
        "interval": list(interval),
        "confidence": settings.confidence,
        "margin": settings.margin,
    }
