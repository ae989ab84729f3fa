"""What must hold besides the gain: each a check with a name, an outcome and a sentence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nudge.components.evaluate.perplexity import Score


@dataclass(frozen=True)
class Check:
    """One thing that stops a promotion if it is not ``ok``; ``told`` says what was found."""

    kind: Literal["loss", "probe", "guard", "completion", "task", "package"]
    name: str
    ok: bool
    told: str


def loss_checks(scores: Mapping[str, Mapping[str, Sequence[Score]]]) -> list[Check]:
    """One check: that every loss of the candidate is a number. ``scores``: by set, by model."""
    broken = {
        name: sum(not math.isfinite(score.nats) for score in of_models["candidate"])
        for name, of_models in scores.items()
    }
    told = "; ".join(
        f"the loss of {count} documents of {name} is no finite number"
        for name, count in broken.items()
        if count
    )
    return [Check("loss", "finite", not told, told or "every loss is a finite number")]


def probe_checks(probes: Sequence[dict[str, Any]]) -> list[Check]:
    """A check for each probe that should hold; one that should rise proves nothing by itself."""
    whose = {"base": "of the base", "incumbent": "of the version served now"}
    return [
        Check(
            "probe",
            probe["prompt"],
            probe["ok"],
            f"P({probe['target']!r}) after {probe['prompt']!r} went from "
            f"{probe['p_before']:.3g} {whose[probe['reference']]} to {probe['p_after']:.3g}, and "
            f"may move by {probe['limit']:.0%}",
        )
        for probe in probes
        if probe["expect"] == "hold"
    ]


def guard_checks(guards: Sequence[dict[str, Any]]) -> list[Check]:
    """A check for each guard set, by the worse end of its interval."""
    return [
        Check(
            "guard",
            guard["name"],
            guard["ok"],
            f"{guard['difference_bits_per_byte']:+.4f} bits per byte on {guard['name']} (interval "
            f"{guard['interval'][0]:+.4f} to {guard['interval'][1]:+.4f}), where at most "
            f"{guard['limit']:+.4f} is allowed",
        )
        for guard in guards
    ]


def task_checks(tasks: Sequence[dict[str, Any]]) -> list[Check]:
    """A check for each task that has a limit."""
    return [
        Check(
            "task",
            task["name"],
            task["ok"],
            f"{task['metric']} of {task['name']} went from {task['reference']:.4f} to "
            f"{task['candidate']:.4f}, and may get worse by {task['limit']:g}",
        )
        for task in tasks
        if task["limit"] is not None
    ]
