"""The gate: is the candidate better, beyond what the choice of held-out documents explains, and
does every check pass?"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from nudge.components.common.artifacts.evaluation import Check, Comparison, Incumbent, Verdict
from nudge.components.common.artifacts.scores import Score
from nudge.components.common.core.figures import significant
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.evaluate.settings import EvaluateSettings

CHUNK = 256
"""Resamples drawn at a time, which bounds memory for any number of documents."""


def paired_bootstrap(
    base: Sequence[Score],
    candidate: Sequence[Score],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[float, tuple[float, float]]:
    """Difference in bits per byte (candidate minus base; negative is better) and its interval.

    Documents are drawn with replacement, and both models are scored on the same draw. The interval
    is the percentile one (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
    13).
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
) -> dict[str, Comparison]:
    """The candidate's difference from each other model on one set of documents, by that model.

    With fewer than `MIN_DOCUMENTS` documents the interval is None: its stated confidence would be
    wrong.
    """
    comparisons = {}
    for name in scores:
        if name != "candidate":
            difference, interval = paired_bootstrap(
                scores[name],
                scores["candidate"],
                resamples=settings.resamples,
                confidence=settings.confidence,
                seed=settings.seed,
            )
            comparisons[name] = Comparison(
                difference_bits_per_byte=difference,
                interval=interval if len(scores[name]) >= MIN_DOCUMENTS else None,
            )
    return comparisons


def verdict(
    scores: Mapping[str, Sequence[Score]],
    checks: Sequence[Check],
    settings: EvaluateSettings,
    incumbent: Incumbent,
    same: bool = False,
    selected: bool = False,
    unit: str = "held-out text",
) -> Verdict:
    """Promote only if the entire interval is better by the margin and every check passes.

    ``scores`` are those of base, candidate and, if one was found, incumbent. The candidate is
    compared with the incumbent if there is one, else with the base model. Nothing is promoted if it
    is unknown whether there is an incumbent, or if the documents are too few for an interval.
    ``same``: the candidate is the incumbent, bit for bit. ``selected``: the scored documents
    include those that chose the candidate's checkpoint, which the reason then says. ``unit`` names
    what was scored of the documents.
    """
    comparisons = compare(scores, settings)
    reference = "incumbent" if "incumbent" in comparisons else "base"
    decisive = comparisons[reference]
    better = decisive.interval is not None and decisive.interval[1] < -settings.margin
    failed = [check for check in checks if not check.ok]
    obstacle = _obstacle(scores, settings, incumbent, decisive, failed, same)
    caveat = selected * (
        "; the checkpoint was chosen by held-out documents that are also scored here, so part of "
        "the gain comes from that choice"
    )
    return Verdict(
        promote=better and not failed and not same and incumbent.state != "unknown",
        reason=obstacle or _gain(settings, incumbent, decisive, failed, unit) + caveat,
        reference=reference,
        difference_bits_per_byte=decisive.difference_bits_per_byte,
        interval=decisive.interval,
        comparisons=comparisons,
        confidence=settings.confidence,
        margin=settings.margin,
        checks=tuple(checks),
    )


def _obstacle(
    scores: Mapping[str, Sequence[Score]],
    settings: EvaluateSettings,
    incumbent: Incumbent,
    decisive: Comparison,
    failed: Sequence[Check],
    same: bool,
) -> str:
    """Why the candidate is not shown to be better; empty if it is."""
    if incumbent.state == "unknown":
        return f"it is unknown what is served now, so nothing can replace it: {incumbent.why}"
    if same:
        return f"this is {_reference(incumbent)}, bit for bit; there is nothing to promote"
    if any(check.kind == "loss" for check in failed):
        return "; ".join(check.message for check in failed if check.kind == "loss")
    if decisive.interval is None:
        return (
            f"only {len(scores['candidate'])} held-out documents were scored, and with fewer than "
            f"{MIN_DOCUMENTS} a difference cannot be distinguished from chance: ingest more text, "
            "or raise ingest.validation_share"
        )
    low, high = decisive.interval
    if not high < -settings.margin:
        return (
            f"not shown to be better than {_reference(incumbent)}: the {settings.confidence:.0%} "
            f"interval of the difference, {low:+.4f} to {high:+.4f} bits per byte, is not "
            f"entirely below {-settings.margin:+.4f}"
        )
    return ""


def _gain(
    settings: EvaluateSettings,
    incumbent: Incumbent,
    decisive: Comparison,
    failed: Sequence[Check],
    unit: str,
) -> str:
    """The gain of a candidate that is better, and the checks that failed."""
    low, high = decisive.interval or (math.nan, math.nan)
    gain = -(decisive.difference_bits_per_byte or 0.0)
    if failed:
        messages = "; ".join(check.message for check in failed)
        return f"better than {_reference(incumbent)} on {unit}, but {messages}"
    return (
        f"better than {_reference(incumbent)} by {_bits(gain)} bits per byte on {unit} "
        f"({settings.confidence:.0%} interval {_bits(-high)} to "
        f"{_bits(-low)})"
    )


def _bits(value: float) -> str:
    """Four decimals; a gain that they would show as zero has two significant digits."""
    return f"{value:.4f}" if abs(value) >= 0.00005 or value == 0 else significant(value)


def _reference(incumbent: Incumbent) -> str:
    return f"the version served now ({incumbent.version})" if incumbent.version else "the base"
