"""The step `evaluate`: score base, served version and candidate alike, and give a verdict."""

import dataclasses
from pathlib import Path
from typing import Any

from nudge.components.common.core.publish import sha256_file
from nudge.components.common.core.step import step
from nudge.components.common.spending.prices import Prices
from nudge.components.evaluate.settings import EvaluateSettings

NO_PRICES = Prices()


@step("evaluate", outputs=("evaluation", "report", "scores"), reuse=False)
def evaluate(
    settings: EvaluateSettings,
    prices: Prices = NO_PRICES,
    /,
    *,
    corpus: Path,
    model: Path,
    history: Path,
    evaluation: Path,
    report: Path,
    scores: Path,
) -> dict[str, Any]:
    """Find the version that is served now and the guards' texts, then `judge` the candidate.

    The evaluation and its report also say what the candidate took to make, and what that costs by
    ``prices``. Returns the results of `judge`, ``evaluation_sha256``, and the total's figures.
    """
    # These load torch and transformers, which the pipeline's face must not need.
    from nudge.components.evaluate.account import add_cost, track_evaluation
    from nudge.components.evaluate.incumbent import bring, find_incumbent
    from nudge.components.evaluate.judge import judge
    from nudge.components.evaluate.tasks import check_tasks
    from nudge.components.evaluate.texts import guard_documents, guards_of

    check_tasks(settings)
    found = find_incumbent(settings.model_name, settings.registry_url)
    incumbent, served = bring(found, settings.model_name, settings.unverified)
    # The incumbent is an input of `judge`, so that the result can be reused for the same one. So
    # are the guards' texts, and their limits are among its settings.
    plain = dataclasses.replace(
        settings, model_name="", registry_url="", unverified=[], guards=guards_of(settings, model)
    )
    guards = {
        guard.name: [dataclasses.asdict(document) for document in guard_documents(guard)]
        for guard in plain.guards or ()
    }
    inputs = {"corpus": corpus, "model": model, "history": history}
    outputs = {"evaluation": evaluation, "report": report, "scores": scores}
    result = judge(plain, incumbent=incumbent, served=served, guards=guards, **inputs, **outputs)
    cost = add_cost(evaluation, report, model, prices)
    track_evaluation(evaluation, report, history)
    return {**result, **cost, "evaluation_sha256": sha256_file(evaluation)}
