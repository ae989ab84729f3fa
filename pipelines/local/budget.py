"""Whether a run will stay within its budget, by what earlier runs of its recipe used here."""

from pathlib import Path

from nudge.components.common.core.recipe import step_settings
from nudge.components.common.spending.budget import OverBudget, over
from nudge.components.common.spending.prices import Budget, Prices
from nudge.components.common.spending.usage import NOTHING, Usage, usage_of
from nudge.components.summary.notify import Notice, notify
from nudge.components.summary.settings import NotifySettings
from nudge.components.train.settings import TrainSettings
from nudge.pipelines.local import history
from nudge.pipelines.recipes import Recipe
from nudge.pipelines.steps import PIPELINE

SEARCHED_RUNS = 30


def check(recipe: Recipe, home: Path) -> None:
    """Raise `OverBudget` if the run will need more than its budget, and send a notification.

    Without an earlier run of the recipe, or without a budget, there is nothing to compare; training
    then checks its own speed after the first steps.
    """
    budget = step_settings(Budget, "budget", recipe.text)
    prices = step_settings(Prices, "prices", recipe.text)
    expected, run_ids = estimate(recipe, home)
    if not run_ids:
        return
    why = over(budget, prices, expected, "needs")
    if not why:
        return
    text = (
        f"{why}; this is what the steps used in {' and '.join(run_ids)}. Nothing was started. "
        "Raise the limit for this run with `--set budget.KEY=VALUE`, or train less"
    )
    model = str(recipe.values.get("model_name") or recipe.name)
    title = f"{model}: a run of {recipe.name} was not started: it is over budget"
    settings = step_settings(NotifySettings, "notify", recipe.text)
    notify(settings, Notice("over budget", f"after-{run_ids[0]}", model, "", title, text))
    raise OverBudget(text)


def estimate(recipe: Recipe, home: Path) -> tuple[Usage, list[str]]:
    """What a run will probably use, and the ids of the earlier runs that this is based on.

    It is the sum of each step's newest complete execution; training is scaled by its epochs or
    steps.
    """
    found: dict[str, Usage] = {}
    run_ids: list[str] = []
    for run in history.runs(home)[:SEARCHED_RUNS]:
        if run.recipe != recipe.name:
            continue
        for name, step in run.steps.items():
            used = usage_of(step.usage)
            if name in found or step.status != "done" or used is None:
                continue
            found[name] = used.times(_ratio(recipe, run)) if name == "train" else used
            if run.run_id not in run_ids:
                run_ids.append(run.run_id)
        if len(found) == len(PIPELINE):
            break
    # Without a training, the other steps say little about a run.
    return sum(found.values(), NOTHING), run_ids if "train" in found else []


def _ratio(recipe: Recipe, run: history.PastRun) -> float:
    """How many times as long a run trains as an earlier one; 1 if the settings do not say."""
    now = step_settings(TrainSettings, "train", recipe.text)
    before = history.settings(run)
    steps = before.get("train.max_steps")
    if now.max_steps and steps:
        return float(now.max_steps / steps)
    epochs = before.get("train.epochs")
    if now.max_steps or steps or not epochs:
        return 1.0
    return float(now.epochs / epochs)
