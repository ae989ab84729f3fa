"""The pipeline: from text to a served model that was shown to be better."""

from typing import Any

from nudge.components.train.component import train
from nudge.pipelines.placement import StepResources, pipeline
from nudge.pipelines.retrain import Named, retrain


@pipeline(
    "train-and-serve",
    "Retrain a language model on your text; serve it if it is shown to be better.",
    trains="tokenize, train and evaluate",
    large="train and of evaluate",
    sized="ingest, tokenize, train and evaluate",
)
def train_and_serve(
    resources: StepResources,
    recipe: str = "package://nudge.pipelines.recipes/eiffel.yaml",
    data_uri: str = "",
    base_model: str = "",
    model_name: str = "",
    version: str = "",
) -> None:
    """Ingest; if there is new text: tokenize, train, evaluate; if better: upload, register, deploy.

    Args:
        recipe: Every setting, as YAML text or a file's URI; the parameters below override it.
        data_uri: Where the text is (s3://, https://, package://, ...); empty: as the recipe says.
        base_model: The model to start from; empty: as the recipe says.
        model_name: The name to register and serve under; empty: as the recipe says.
        version: The name of the new version; empty: the run's id.
    """

    def trained(tokens: Any) -> Any:
        task = train(recipe=recipe, base_model=base_model, tokens=tokens)
        return resources.large.put("train", task)

    retrain(
        "train-and-serve",
        resources,
        Named(recipe, data_uri, base_model, model_name, version),
        trained,
        resources.training_pod(),
    )
