"""Whether a run's usage stays within the recipe's section `budget`."""

from nudge.components.common.core.prices import Budget, Prices
from nudge.components.common.core.usage import Usage

OVER_BUDGET = "over budget: "
"""The beginning of the error of a run that its budget stops."""


def over(budget: Budget, prices: Prices, used: Usage, verb: str) -> str:
    """Why ``used`` exceeds the budget, such as "the run has used 3.2 GPU hours, and
    budget.gpu_hours is 3"; empty if it does not. ``verb`` is "has used" or "needs"."""
    cost = prices.cost(**used.amounts())
    measures = {
        "cost": (cost, f"{prices.currency} {{:.2f}}", budget.cost),
        "gpu_hours": (used.gpu_hours, "{:.3g} GPU hours", budget.gpu_hours),
        "core_hours": (used.core_hours, "{:.3g} core hours", budget.core_hours),
        "hours": (used.seconds / 3600, "{:.3g} hours", budget.hours),
    }
    found = [
        f"the run {verb} {'about ' if verb == 'needs' else ''}{form.format(amount)}, and "
        f"budget.{name} is {limit:g}"
        for name, (amount, form, limit) in measures.items()
        if limit is not None and amount is not None and amount > limit
    ]
    return "; ".join(found)
