"""Whether a run's usage stays within the recipe's section `budget`."""

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.figures import money, significant
from nudge.components.common.spending.prices import Budget, Prices
from nudge.components.common.spending.usage import Usage

OVER_BUDGET = "over budget: "
"""The beginning of the text of an `OverBudget`, by which other processes recognize it in a log."""


class OverBudget(UserError):
    """The budget stops the run. With a larger one, training resumes from its checkpoint."""

    status = 3

    def __init__(self, text: str) -> None:
        super().__init__(text if OVER_BUDGET in text else f"{OVER_BUDGET}{text}")


def over(budget: Budget, prices: Prices, used: Usage, verb: str) -> str:
    """Why ``used`` exceeds the budget, such as "the run has used 3.2 GPU hours, and
    budget.gpu_hours is 3"; empty if it does not. ``verb`` is "has used" or "needs"."""

    def hours(amount: float, unit: str) -> tuple[float, str]:
        return amount, f"{significant(amount, 3)} {unit}"

    cost = prices.cost(**used.amounts()) or 0.0
    measures = {
        "cost": (cost, money(cost, prices.currency)),
        "gpu_hours": hours(used.gpu_hours, "GPU hours"),
        "core_hours": hours(used.core_hours, "core hours"),
        "hours": hours(used.seconds / 3600, "hours"),
    }
    found = []
    for name, (amount, shown) in measures.items():
        limit = getattr(budget, name)
        if limit is not None and amount > limit:
            about = "about " if verb == "needs" else ""
            found.append(f"the run {verb} {about}{shown}, and budget.{name} is {limit:g}")
    return "; ".join(found)
