"""The requirements besides the gain: each is a check with a name, an outcome and a message."""

import math
from collections.abc import Mapping, Sequence

from nudge.components.common.artifacts.evaluation import (
    Check,
    GuardResult,
    ProbeResult,
    TaskResult,
)
from nudge.components.common.artifacts.scores import Score

REFERENCES = {"base": "the base", "incumbent": "the version served now"}


def loss_checks(scores: Mapping[str, Mapping[str, Sequence[Score]]]) -> list[Check]:
    """One check: every loss of the candidate is finite. ``scores`` are by set, then by model."""
    broken = {
        name: sum(not math.isfinite(score.nats) for score in of_models["candidate"])
        for name, of_models in scores.items()
    }
    message = "; ".join(
        f"the loss of {count} documents of {name} is not a finite number"
        for name, count in broken.items()
        if count
    )
    return [Check("loss", "finite", not message, message or "every loss is a finite number")]


def probe_checks(probes: Sequence[ProbeResult]) -> list[Check]:
    """One check per probe that should hold; a probe that should rise proves nothing by itself."""
    return [
        Check(
            "probe",
            probe.prompt,
            probe.ok,
            f"P({probe.target!r}) after {probe.prompt!r} went from {probe.p_before:.3g} for "
            f"{REFERENCES[probe.reference]} to {probe.p_after:.3g}, and may move by "
            f"{probe.limit:.0%}",
        )
        for probe in probes
        if probe.expect == "hold"
    ]


def guard_checks(guards: Sequence[GuardResult]) -> list[Check]:
    """One check per guard set, by the worse end of its interval."""
    return [Check("guard", guard.name, guard.ok, _guard_message(guard)) for guard in guards]


def _guard_message(guard: GuardResult) -> str:
    low, high = guard.interval or (math.nan, math.nan)
    return (
        f"{guard.difference_bits_per_byte:+.4f} bits per byte on {guard.name} (interval "
        f"{low:+.4f} to {high:+.4f}), where at most {guard.limit:+.4f} is allowed"
    )


def task_checks(tasks: Sequence[TaskResult]) -> list[Check]:
    """One check per task that has a limit."""
    return [
        Check(
            "task",
            task.name,
            task.ok,
            f"{task.metric} of {task.name} went from {task.reference:.4f} to "
            f"{task.candidate:.4f}, and may get worse by {task.limit:g}",
        )
        for task in tasks
        if task.limit is not None
    ]
