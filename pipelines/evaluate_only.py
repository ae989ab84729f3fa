"""Evaluate a model that was trained before, on the text there is now; nothing is changed by it."""

from kfp import dsl
from nudge.components.common.images import DATA_IMAGE, TRAIN_IMAGE
from nudge.components.evaluate.component import evaluate
from nudge.components.fetch.component import fetch
from nudge.components.ingest.component import ingest
from nudge.pipelines.placement import CONNECTION, SETTINGS, Place


@dsl.pipeline(
    name="evaluate-only",
    description="Compare a trained model with its base on the text there is now; change nothing.",
)
def evaluate_only(
    model_uri: str,
    recipe: str = "package://nudge.pipelines.recipes/eiffel.yaml",
    data_uri: str = "",
    base_model: str = "",
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
    """Ingest the text, fetch the model, evaluate.

    Args:
        model_uri: The model, as a run uploaded it (s3://...), or incumbent://<model>.
        recipe: Every setting, as YAML text or the URI of a file; what follows stands above it.
        data_uri: Where the text is (s3://, https://, package://, ...); empty: as the recipe says.
        base_model: The model to compare with; empty: as the recipe says.
        connection: The Secret of the S3 data connection.
        settings: A ConfigMap that may hold NUDGE_REGISTRY_URL, NUDGE_REGISTRY_CA, HF_ENDPOINT.
        data_image: The image of every step but evaluate.
        train_image: The image of evaluate.
        cpu: CPU cores of evaluate.
        memory: Memory of evaluate, shared memory counted in.
        gpu_type: The resource name of the GPUs, such as nvidia.com/gpu or amd.com/gpu.
        gpu_count: GPUs of evaluate; 0 for none.
        tolerations: Tolerations of evaluate, a JSON list as in a pod.
        node_selector: Labels of the nodes for evaluate, a JSON object.
    """
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
    ingested = ingest(recipe=recipe, data_uri=data_uri, model_name="")
    # New text may stand behind the same URI, and another model behind incumbent://.
    small.put("ingest", ingested).set_caching_options(False)
    fetched = small.put("fetch", fetch(model_uri=model_uri)).set_caching_options(False)
    evaluated = evaluate(
        recipe=recipe,
        base_model=base_model,
        model_name="",
        corpus=ingested.outputs["corpus"],
        model=fetched.outputs["model"],
        history=fetched.outputs["history"],
    )
    large.put("evaluate", evaluated).set_caching_options(False)
