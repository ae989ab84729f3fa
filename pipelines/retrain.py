"""From text to a served model: the part that all training pipelines share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kfp import dsl

from nudge.components.deploy.component import deploy
from nudge.components.evaluate.component import evaluate
from nudge.components.ingest.component import ingest
from nudge.components.register.component import register
from nudge.components.summary.component import summary
from nudge.components.tokenize.component import tokenize
from nudge.components.upload.component import upload
from nudge.pipelines.placement import StepResources

RUN_ID = dsl.PIPELINE_JOB_ID_PLACEHOLDER


@dataclass(frozen=True)
class Named:
    """The recipe and the parameters that take precedence; empty means as the recipe says."""

    recipe: Any
    data_uri: Any
    base_model: Any = ""
    model_name: Any = ""
    version: Any = ""


def retrain(
    name: str,
    resources: StepResources,
    given: Named,
    train: Callable[[Any], Any],
    pod: Mapping[str, Any],
) -> None:
    """Ingest; if there is new text: tokenize, train, evaluate; if better: upload, register, deploy.

    ``train`` creates the training task from the tokens artifact. ``pod`` is what ingest must know
    about the pod that trains.
    """
    recipe, model_name = given.recipe, given.model_name
    small = resources.small
    run = {
        "recipe": recipe, "model_name": model_name, "version": given.version, "run_id": RUN_ID,
    }  # fmt: skip
    finish = small.put("summary", summary(**run))
    finish.set_caching_options(False)
    with dsl.ExitHandler(finish, name=name):
        ingested = ingest(
            recipe=recipe,
            data_uri=given.data_uri,
            model_name=model_name,
            version=given.version,
            registers=True,
            base_model=given.base_model,
            **pod,
        )
        # The same URI may have new text.
        small.put("ingest", ingested).set_caching_options(False)
        corpus = ingested.outputs["corpus"]
        # kfp.local resolves conditions only on an output that has no name of its own.
        with dsl.If(ingested.outputs["Output"] == 1, name="new-text"):
            tokenized = tokenize(recipe=recipe, base_model=given.base_model, corpus=corpus)
            resources.with_torch.put("tokenize", tokenized)
            trained = train(tokenized.outputs["tokens"])
            model = trained.outputs["model"]
            evaluated = evaluate(
                recipe=recipe,
                base_model=given.base_model,
                model_name=model_name,
                corpus=corpus,
                model=model,
                history=trained.outputs["history"],
            )
            resources.large.put("evaluate", evaluated)
            # Another version may be served by now.
            evaluated.set_caching_options(False)
            with dsl.If(evaluated.outputs["Output"] == 1, name="promote"):
                uploaded = small.put("upload", upload(**run, model=model))
                registered = register(
                    **run,
                    uri=uploaded.output,
                    model=model,
                    evaluation=evaluated.outputs["evaluation"],
                    # Artifacts pass through a bucket, and parameters do not.
                    evaluation_sha256=evaluated.outputs["evaluation_sha256"],
                )
                small.put("register", registered)
                deployed = deploy(
                    recipe=recipe,
                    registered_model=registered.outputs["registered_model"],
                    version=registered.outputs["version"],
                )
                small.put("deploy", deployed)
                # These change the world; a cached result would claim something that did not happen.
                for task in (uploaded, registered, deployed):
                    task.set_caching_options(False)
