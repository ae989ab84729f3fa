"""The pipeline: text in, a model that is shown to be better served, all of it traceable."""

from kfp import dsl
from nudge.components.common.images import DATA_IMAGE, TRAIN_IMAGE
from nudge.components.deploy.component import deploy
from nudge.components.evaluate.component import evaluate
from nudge.components.ingest.component import ingest
from nudge.components.register.component import register
from nudge.components.summary.component import summary
from nudge.components.tokenize.component import tokenize
from nudge.components.train.component import train
from nudge.components.upload.component import upload
from nudge.pipelines.placement import CONNECTION, SETTINGS, Place

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
    connection: str = CONNECTION,
    settings: str = SETTINGS,
    data_image: str = DATA_IMAGE,
    train_image: str = TRAIN_IMAGE,
    cpu: str = "8",
    memory: str = "32Gi",
    gpu_type: str = "nvidia.com/gpu",
    gpu_count: str = "1",
    tolerations: list = [],  # type: ignore[type-arg]  # noqa: B006
    node_selector: dict = {},  # type: ignore[type-arg]  # noqa: B006
) -> None:
    """Ingest; if there is new text: tokenize, train, evaluate; if better: upload, register, deploy.

    Args:
        recipe: Every setting, as YAML text or the URI of a file; what follows stands above it.
        data_uri: Where the text is (s3://, https://, package://, ...); empty: as the recipe says.
        base_model: The model to start from; empty: as the recipe says.
        model_name: The name to register and serve under; empty: as the recipe says.
        version: The name of the new version; empty: the run's id.
        connection: The Secret of the S3 data connection.
        settings: A ConfigMap that may hold NUDGE_REGISTRY_URL, NUDGE_REGISTRY_CA, HF_ENDPOINT.
        data_image: The image of every step but tokenize, train and evaluate.
        train_image: The image of tokenize, train and evaluate.
        cpu: CPU cores of train and of evaluate.
        memory: Memory of train and of evaluate, shared memory counted in.
        gpu_type: The resource name of the GPUs, such as nvidia.com/gpu or amd.com/gpu.
        gpu_count: GPUs of train and of evaluate; 0 for none.
        tolerations: Tolerations of train and of evaluate, a JSON list as in a pod.
        node_selector: Labels of the nodes for train and evaluate, a JSON object.
    """
    named = {"recipe": recipe, "model_name": model_name, "version": version, "run_id": RUN_ID}
    small = Place(data_image, connection, settings)
    large = Place(
        train_image,
        connection,
        settings,
        cpu=cpu,
        memory=memory,
        gpu_type=gpu_type,
        gpu_count=gpu_count,
        tolerations=tolerations,
        node_selector=node_selector,
    )
    finish = small.put("summary", summary(**named))
    finish.set_caching_options(False)
    with dsl.ExitHandler(finish, name="train-and-serve"):
        ingested = ingest(recipe=recipe, data_uri=data_uri, model_name=model_name)
        # New text may stand behind the same URI.
        small.put("ingest", ingested).set_caching_options(False)
        corpus = ingested.outputs["corpus"]
        # kfp.local resolves conditions only on an output that has no name of its own.
        with dsl.If(ingested.outputs["Output"] == 1, name="new-text"):
            tokenized = tokenize(recipe=recipe, base_model=base_model, corpus=corpus)
            Place(train_image, connection, settings).put("tokenize", tokenized)
            tokens = tokenized.outputs["tokens"]
            trained = train(recipe=recipe, base_model=base_model, tokens=tokens)
            large.put("train", trained)
            model = trained.outputs["model"]
            evaluated = evaluate(
                recipe=recipe,
                base_model=base_model,
                model_name=model_name,
                corpus=corpus,
                model=model,
                history=trained.outputs["history"],
            )
            large.put("evaluate", evaluated)
            # Another version may be served by now.
            evaluated.set_caching_options(False)
            with dsl.If(evaluated.outputs["Output"] == 1, name="promote"):
                uploaded = small.put("upload", upload(**named, model=model))
                registered = register(
                    **named,
                    uri=uploaded.output,
                    model=model,
                    evaluation=evaluated.outputs["evaluation"],
                )
                small.put("register", registered)
                deployed = deploy(
                    recipe=recipe,
                    registered_model=registered.outputs["registered_model"],
                    version=registered.outputs["version"],
                )
                small.put("deploy", deployed)
                # These change the world; an answer from a cache would claim what did not happen.
                for task in (uploaded, registered, deployed):
                    task.set_caching_options(False)
