"""What a training may use at most, and how its ranks learn of that."""

from dataclasses import asdict, dataclass
from typing import Any

from nudge.components.common.core.recipe import read_recipe, step_settings
from nudge.components.common.spending.prices import Budget, Prices
from nudge.components.common.spending.usage import NOTHING, Usage, plain_usage, usage_of


@dataclass(frozen=True)
class Limits:
    """The budget of a run, the prices that apply to it, and what the run used before training."""

    budget: Budget
    prices: Prices
    used: Usage = NOTHING

    @property
    def any(self) -> bool:
        """Whether anything is limited."""
        return any(value is not None for value in asdict(self.budget).values())

    def plain(self) -> dict[str, Any]:
        """The sections of a rank's recipe from which `limits_of` reads them."""
        return {
            "budget": {key: value for key, value in asdict(self.budget).items() if value},
            "prices": asdict(self.prices),
            "used": plain_usage(self.used),
        }


NO_LIMITS = Limits(Budget(), Prices())


def limits_of(recipe: str) -> Limits:
    """The limits in a recipe's text."""
    return Limits(
        step_settings(Budget, "budget", recipe),
        step_settings(Prices, "prices", recipe),
        usage_of(read_recipe(recipe).get("used")) or NOTHING,
    )
