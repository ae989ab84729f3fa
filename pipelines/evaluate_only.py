"""Evaluate a trained model on the current text, without changing anything."""

from nudge.components.evaluate.component import evaluate
from nudge.components.fetch.component import fetch
from nudge.components.ingest.component import ingest
from nudge.pipelines.placement import StepResources, pipeline


@pipeline(
    "evaluate-only",
    "Compare a trained model with its base on the current text; change nothing.",
    trains="evaluate",
    large="evaluate",
    sized="ingest and evaluate",
)
def evaluate_only(
    resources: StepResources,
    model_uri: str,
    recipe: str = "package://nudge.pipelines.recipes/eiffel.yaml",
    data_uri: str = "",
    base_model: str = "",
) -> None:
    """Ingest the text, fetch the model, evaluate.

    Args:
        model_uri: The model, as a run uploaded it (s3://...), or incumbent://<model>.
        recipe: Every setting, as YAML text or a file's URI; the parameters below override it.
        data_uri: Where the text is (s3://, https://, package://, ...); empty: as the recipe says.
        base_model: The model to compare with; empty: as the recipe says.
    """
    ingested = ingest(recipe=recipe, data_uri=data_uri, model_name="")
    # New text may stand behind the same URI, and another model behind incumbent://.
    resources.small.put("ingest", ingested).set_caching_options(False)
    fetched = fetch(model_uri=model_uri)
    resources.small.put("fetch", fetched).set_caching_options(False)
    evaluated = evaluate(
        recipe=recipe,
        base_model=base_model,
        model_name="",
        corpus=ingested.outputs["corpus"],
        model=fetched.outputs["model"],
        history=fetched.outputs["history"],
    )
    resources.large.put("evaluate", evaluated).set_caching_options(False)
