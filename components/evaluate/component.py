from kfp import dsl

from nudge.components.common.core.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate(
    recipe: str,
    base_model: str,
    model_name: str,
    corpus: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    history: dsl.Input[dsl.Artifact],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    scores: dsl.Output[dsl.Dataset],
    evaluation_sha256: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> int:
    """Score base, served version and candidate on held-out text, and decide whether to promote.

    Args:
        recipe: The recipe, as YAML text or a URI.
        base_model: The model to compare with; empty means the one in the recipe.
        model_name: The model whose served version is the incumbent; empty means the recipe's.
        corpus: The output of `ingest`; its validation split is scored.
        model: The model that `train` trained.
        history: The training history that `train` wrote.
        evaluation: Metrics, probes and verdict, as JSON.
        metrics: The metrics that the dashboard shows.
        report: One HTML page: is the candidate better, and can that be trusted?
        scores: Every document's score under every model, as Parquet.
        evaluation_sha256: The sha256 of the evaluation, so that `register` notices a change.

    Returns:
        1 if the candidate is shown to be better and every check passes, else 0.
    """
    import math
    from pathlib import Path

    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.evaluate.evaluate import evaluate
    from nudge.components.evaluate.settings import evaluate_settings, prices_of

    with exit_with_user_errors():
        named = {"base_model": base_model, "model_name": model_name}
        settings = evaluate_settings(recipe, **named)
        inputs = {"corpus": corpus, "model": model, "history": history}
        outputs = {"evaluation": evaluation, "report": report, "scores": scores}
        paths = {name: Path(artifact.path) for name, artifact in {**inputs, **outputs}.items()}
        result = evaluate(settings, prices_of(recipe), **paths)
        Path(evaluation_sha256).write_text(result["evaluation_sha256"])
        for name, value in result.items():
            if isinstance(value, int | float) and math.isfinite(value):
                metrics.log_metric(name, value)
    return int(result["promote"])
