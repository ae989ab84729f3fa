"""The step `evaluate`: score base, served version and candidate alike, and give a verdict."""

import dataclasses
from pathlib import Path
from typing import Any

from nudge.components.common.core.publish import sha256_file
from nudge.components.common.core.step import step
from nudge.components.evaluate.settings import EvaluateSettings


@step("evaluate", outputs=("evaluation", "report", "scores"), reuse=False)
def evaluate(
    settings: EvaluateSettings,
    *,
    corpus: Path,
    model: Path,
    history: Path,
    evaluation: Path,
    report: Path,
    scores: Path,
) -> dict[str, Any]:
    """Find the version that is served now and the guards' texts, then `judge` the candidate.

    Returns the results of `judge`, and ``evaluation_sha256``.
    """
    # These load torch and transformers, which the pipeline's face must not need.
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
    return {**result, "evaluation_sha256": sha256_file(evaluation)}
