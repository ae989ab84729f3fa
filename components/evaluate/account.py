"""What a candidate took to make, in its evaluation and on its report; and both in MLflow."""

import dataclasses
from pathlib import Path

from nudge.components.common.artifacts.cost import cost_of
from nudge.components.common.artifacts.evaluation import read_evaluation, write_evaluation
from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.clients.tracking import Tracking, tracked_run
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.step import kept_usage
from nudge.components.common.spending.prices import Prices
from nudge.components.common.spending.usage import Usage, of_earlier_steps, so_far, usage_of
from nudge.components.evaluate.report import render_report


def add_cost(evaluation: Path, report: Path, model: Path, prices: Prices) -> dict[str, float]:
    """Write the cost of the candidate into its evaluation and report; returns the main figures.

    A local run knows all steps from its events. A pod knows training, from the model's facts, and
    this step.
    """
    usages: dict[str, Usage] = of_earlier_steps(reused=True)
    # The facts include attempts that were interrupted, and the nodes of a job.
    if trained := usage_of(read_model_facts(model).training.usage):
        usages["train"] = trained
    usages["evaluate"] = kept_usage() or so_far()
    found = read_evaluation(evaluation)
    difference = found.verdict.difference_bits_per_byte if found.verdict else None
    found = dataclasses.replace(found, cost=cost_of(usages, prices, difference))
    write_evaluation(evaluation, found)
    write_atomic(report, render_report(found))
    assert found.cost is not None
    figures = {
        "core_hours": found.cost.total.core_hours,
        "gpu_hours": found.cost.total.gpu_hours,
        "kwh": found.cost.total.kwh,
        "cost": found.cost.total.cost,
        "cost_per_gained_bit_per_byte": found.cost.per_gained_bit,
    }
    return {name: value for name, value in figures.items() if value is not None}


def track_evaluation(evaluation: Path, report: Path, history: Path) -> None:
    """Log the gate's figures, the verdict and the report into the run in MLflow that has the
    training's curves, or that the platform created; does nothing without MLFLOW_TRACKING_URI."""
    found = read_evaluation(evaluation)
    assert found.verdict is not None
    tracking = Tracking()
    tracking.start(found.recipe or "evaluate", run_id=tracked_run(history))
    figures = {
        f"evaluate/{name}/{key}": value
        for name, metrics in found.metrics.items()
        for key, value in dataclasses.asdict(metrics).items()
        if value is not None
    }
    difference = found.verdict.difference_bits_per_byte
    figures["evaluate/promote"] = float(found.verdict.promote)
    if difference is not None:
        figures["evaluate/difference_bits_per_byte"] = difference
    if found.cost:
        amounts = found.cost.properties().items()
        figures |= {name: value for name, value in amounts if isinstance(value, int | float)}
    tracking.metrics(figures, found.training.steps or 0 if found.training else 0)
    promote = str(found.verdict.promote).lower()
    tracking.tags({"nudge.verdict": found.verdict.reason, "nudge.promote": promote})
    tracking.file(report, "evaluation.html")
    tracking.file(evaluation, "evaluation.json")
    tracking.end("FINISHED")
