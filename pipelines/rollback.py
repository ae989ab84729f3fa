"""The way back as a pipeline of its own: what `nudge rollback` does, for the dashboard."""

from nudge.components.deploy.component import roll_back
from nudge.pipelines.placement import StepResources, pipeline


@pipeline(
    "rollback", "Give a model's traffic back to the version served before, or to a named one."
)
def rollback(
    resources: StepResources,
    model_name: str,
    to_version: str = "",
    recipe: str = "package://nudge.pipelines.recipes/eiffel.yaml",
) -> None:
    """Bring the older version up, test it, and move the traffic; then the newer one ends.

    Args:
        model_name: The model, by its name in the registry.
        to_version: The version to go back to; empty: the one that was served before.
        recipe: The recipe that it was deployed with, as YAML text or the URI of a file.
    """
    # The component's name differs from the pipeline's: kfp takes the one for the other on loading.
    rolled = roll_back(recipe=recipe, model_name=model_name, to_version=to_version)
    # It changes the world; an answer from a cache would claim what did not happen.
    resources.small.put("roll_back", rolled).set_caching_options(False)
