"""What it took to make a version: time, energy and money by step, and per gained bit per byte."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nudge.components.common.artifacts.schema import Omitted
from nudge.components.common.spending.prices import Prices
from nudge.components.common.spending.usage import NOTHING, Usage


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one step used. A reused step counts with what it used when it ran."""

    seconds: float
    """Wall time."""
    core_hours: float
    """CPU time of its processes."""
    gpu_hours: float
    kwh: Omitted[float] = None
    """Energy that the devices reported: of the machine, so it includes what else ran there; None if
    no device reports it."""
    cost: Omitted[float] = None
    """In the recipe's currency; None without prices."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a version, from the first step to the end of its evaluation."""

    steps: dict[str, StepCost] = field(default_factory=dict)
    """By step. On a cluster only `train` and `evaluate`: the others' figures are in the run's
    summary."""
    total: StepCost
    currency: str = ""
    """Empty without prices."""
    gained_bits_per_byte: Omitted[float] = None
    """How much better than the model of the verdict; None if it is not better."""
    per_gained_bit: Omitted[float] = None
    """The cost of one bit per byte gained; None without prices or gain."""
    gpu_hours_per_gained_bit: Omitted[float] = None
    core_hours_per_gained_bit: Omitted[float] = None

    def properties(self) -> dict[str, float | str | None]:
        """Flat values for a registry or a metrics store, under ``usage.``."""
        flat: dict[str, float | str | None] = {
            "usage.seconds": self.total.seconds,
            "usage.core_hours": self.total.core_hours,
            "usage.gpu_hours": self.total.gpu_hours,
            "usage.kwh": self.total.kwh,
            "usage.cost": self.total.cost,
            "usage.currency": self.currency or None,
            "usage.cost_per_gained_bit_per_byte": self.per_gained_bit,
            "usage.gpu_hours_per_gained_bit_per_byte": self.gpu_hours_per_gained_bit,
            "usage.core_hours_per_gained_bit_per_byte": self.core_hours_per_gained_bit,
        }
        for name, step in self.steps.items():
            for key in ("core_hours", "gpu_hours", "kwh", "cost"):
                flat[f"usage.{name}.{key}"] = getattr(step, key)
        return flat


def step_cost(usage: Usage, prices: Prices) -> StepCost:
    """One usage with its cost."""
    return StepCost(
        seconds=usage.seconds,
        core_hours=usage.core_hours,
        gpu_hours=usage.gpu_hours,
        kwh=usage.kwh,
        cost=prices.cost(**usage.amounts()),
    )


def cost_of(usages: Mapping[str, Usage], prices: Prices, difference: float | None) -> Cost:
    """The cost of the steps together; ``difference`` is the verdict's, in bits per byte."""
    total = step_cost(sum(usages.values(), NOTHING), prices)
    gained = -difference if difference is not None and difference < 0 else None

    def per_gain(amount: float | None) -> float | None:
        return amount / gained if gained and amount else None

    return Cost(
        steps={name: step_cost(usage, prices) for name, usage in usages.items()},
        total=total,
        currency=prices.currency if prices.known else "",
        gained_bits_per_byte=gained,
        per_gained_bit=per_gain(total.cost),
        gpu_hours_per_gained_bit=per_gain(total.gpu_hours),
        core_hours_per_gained_bit=per_gain(total.core_hours),
    )
