"""The gate: is the candidate better, beyond what the choice of held-out documents explains, and
does all else hold?"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.evaluate.checks import Check
from nudge.components.evaluate.incumbent import Incumbent
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


def compare(
    scores: Mapping[str, Sequence[Score]], settings: EvaluateSettings
) -> dict[str, dict[str, Any]]:
    """The candidate's difference to each other model on one set of documents, by that model.

    Of fewer than `FEWEST_DOCUMENTS` the interval is None: it would promise what it does not hold.
    """
    comparisons: dict[str, dict[str, Any]] = {}
    for name in scores:
        if name != "candidate":
            gap, ends = paired_bootstrap(
                scores[name],
                scores["candidate"],
                resamples=settings.resamples,
                confidence=settings.confidence,
                seed=settings.seed,
            )
            told = list(ends) if len(scores[name]) >= MIN_DOCUMENTS else None
            comparisons[name] = {"difference_bits_per_byte": gap, "interval": told}
    return comparisons


def verdict(
    scores: Mapping[str, Sequence[Score]],
    checks: Sequence[Check],
    settings: EvaluateSettings,
    incumbent: Incumbent,
    same: bool = False,
    selected: bool = False,
) -> dict[str, Any]:
    """Promote only if the whole interval is better by the margin and every check is ok.

    ``scores`` are those of base, candidate and, if one was found, incumbent. The candidate is held
    against the incumbent if there is one, else against the base model; if it is not known whether
    there is one, nothing is promoted; nor where documents are too few for an interval. ``same``:
    the candidate is the incumbent, bit for bit. ``selected``: its checkpoint was chosen by
    documents that are scored here, which is said beside a gain.
    """
    comparisons = compare(scores, settings)
    reference = "incumbent" if "incumbent" in comparisons else "base"
    told = f"the version served now ({incumbent.version})" if incumbent.version else "the base"
    difference: float = comparisons[reference]["difference_bits_per_byte"]
    interval: list[float] | None = comparisons[reference]["interval"]
    low, high = interval or (math.nan, math.nan)
    failed = [check for check in checks if not check.ok]
    better = high < -settings.margin
    chosen = selected * (
        "; its checkpoint was chosen by held-out documents that are scored here too, so part of "
        "the gain is chosen"
    )
    if incumbent.state == "unknown":
        reason = f"it is not known what is served now, so nothing can replace it: {incumbent.why}"
    elif same:
        reason = f"this is {told} again, bit for bit; there is nothing to promote"
    elif any(check.kind == "loss" for check in failed):
        reason = "; ".join(check.told for check in failed if check.kind == "loss")
    elif interval is None:
        reason = (
            f"{len(scores['candidate'])} held-out documents were scored, and of fewer than "
            f"{MIN_DOCUMENTS} it cannot be told whether a difference is chance: ingest more "
            "text, or hold out a larger ingest.validation_share"
        )
    elif not better:
        reason = (
            f"not shown to be better than {told}: the {settings.confidence:.0%} interval of the "
            f"difference, {low:+.4f} to {high:+.4f} bits per byte, "
            f"does not lie below {-settings.margin:+.4f}"
        )
    elif failed:
        what = "; ".join(check.told for check in failed)
        reason = f"better than {told} on held-out text, but {what}{chosen}"
    else:
        reason = (
            f"better than {told} by {-difference:.4f} bits per byte on held-out text "
            f"({settings.confidence:.0%} interval {-high:.4f} to {-low:.4f}){chosen}"
        )
    return {
        "promote": better and not failed and not same and incumbent.state != "unknown",
        "reason": reason,
        "reference": reference,
        "difference_bits_per_byte": difference,
        "interval": interval,
        "comparisons": comparisons,
        "confidence": settings.confidence,
        "margin": settings.margin,
        "checks": [dataclasses.asdict(check) for check in checks],
    }
