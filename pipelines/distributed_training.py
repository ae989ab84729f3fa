"""The pipeline with its training on many nodes: a job of the cluster, which the step follows."""

from typing import Any

from nudge.components.train.component import train_on_nodes
from nudge.pipelines.placement import StepResources, pipeline
from nudge.pipelines.retrain import Named, retrain


@pipeline(
    "distributed-training",
    "Retrain a language model on many nodes; serve it if it is shown to be better.",
    trains="tokenize, evaluate and the nodes",
    large="evaluate",
    sized="ingest, tokenize and evaluate",
    placed="each node and of evaluate",
)
def distributed_training(
    resources: StepResources,
    recipe: str = "package://nudge.pipelines.recipes/eiffel.yaml",
    data_uri: str = "",
    model_name: str = "",
    nodes: str = "",
    gpus_per_node: str = "",
) -> None:
    """Train and serve, with the training as a TrainJob or what else `train.launcher` names.

    Args:
        recipe: Every setting, as YAML text or a file's URI; the parameters below override it.
        data_uri: Where the text is (s3://, https://, package://, ...); empty: as the recipe says.
        model_name: The name to register and serve under; empty: as the recipe says.
        nodes: Nodes that train together; empty: as the recipe says (train.cluster).
        gpus_per_node: GPUs of each node, a rank each; 0: CPUs alone; empty: as the recipe says.
    """
    at = resources.values

    def trained(tokens: Any) -> Any:
        task = train_on_nodes(
            recipe=recipe,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            gpu_type=at["gpu_type"],
            image=at["train_image"],
            connection=at["connection"],
            tolerations=at["tolerations"],
            node_selector=at["node_selector"],
            tokens=tokens,
        )
        return resources.with_torch.put("train_on_nodes", task)

    retrain(
        "distributed-training",
        resources,
        Named(recipe, data_uri, model_name=model_name),
        trained,
        {},  # the recipe or the parameters say what its nodes have
    )
