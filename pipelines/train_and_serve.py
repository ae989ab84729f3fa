"""The pipeline: text in, a model that is shown to be better served, all of it traceable."""

from kfp import dsl
from nudge.components.deploy.component import deploy
from nudge.components.evaluate.component import evaluate
from nudge.components.ingest.component import ingest
from nudge.components.register.component import register
from nudge.components.summary.component import summary
from nudge.components.tokenize.component import tokenize
from nudge.components.train.component import train
from nudge.components.upload.component import upload

RUN_ID = dsl.PIPELINE_JOB_ID_PLACEHOLDER


@dsl.pipeline(
    name="train-and-serve",
    description="Retrain a language model on your text; serve it if it is shown to be better.",
)
def train_and_serve(
    recipe: str = "package://nudge.pipelines.recipes/eiffel.yaml",
    data_uri: str = "",
    base_model: str = "",
    model_name: str = "",
    version: str = "",
) -> None:
    """Ingest, tokenize, train, evaluate; if better: upload, register, deploy.

    Args:
        recipe: Every setting, as YAML text or the URI of a file; what follows stands above it.
        data_uri: Where the text is (s3://, https://, package://, ...); empty: as the recipe says.
        base_model: The model to start from; empty: as the recipe says.
        model_name: The name to register and serve under; empty: as the recipe says.
        version: The name of the new version; empty: the run's id.
    """
    named = {"recipe": recipe, "model_name": model_name, "version": version, "run_id": RUN_ID}
    finish = summary(**named)
    finish.set_caching_options(False)
    with dsl.ExitHandler(finish, name="train-and-serve"):
        ingested = ingest(recipe=recipe, data_uri=data_uri)
        # New text may stand behind the same URI.
        ingested.set_caching_options(False)
        tokenized = tokenize(
            recipe=recipe, base_model=base_model, corpus=ingested.outputs["corpus"]
        )
        trained = train(recipe=recipe, base_model=base_model, tokens=tokenized.outputs["tokens"])
        evaluated = evaluate(
            recipe=recipe,
            base_model=base_model,
            corpus=ingested.outputs["corpus"],
            model=trained.outputs["model"],
            history=trained.outputs["history"],
        )
        # kfp.local resolves conditions only on an output that has no name of its own.
        with dsl.If(evaluated.outputs["Output"] == 1, name="promote"):
            uploaded = upload(**named, model=trained.outputs["model"])
            registered = register(
                **named,
                uri=uploaded.output,
                model=trained.outputs["model"],
                evaluation=evaluated.outputs["evaluation"],
            )
            deployed = deploy(
                recipe=recipe,
                registered_model=registered.outputs["registered_model"],
                version=registered.outputs["version"],
            )
            # These change the world; an answer from a cache would claim what did not happen.
            for task in (uploaded, registered, deployed):
                task.set_caching_options(False)
