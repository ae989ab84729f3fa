from kfp import dsl

from nudge.components.common.core.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def train(
    recipe: str,
    base_model: str,
    tokens: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    history: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the base model on the tokens.

    Args:
        recipe: The recipe, as YAML text or a URI.
        base_model: The model to start from; empty means as the recipe says.
        tokens: What `tokenize` made.
        model: A Hugging Face folder that transformers and vLLM load.
        history: Loss, learning rate, speed and the watched prompt, step by step.
        report: The loss curve and what it took, as a page.
        metrics: The last losses and the speed.
    """
    from pathlib import Path

    from nudge.components.common.core.recipe import step_settings
    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.train.settings import TrainSettings
    from nudge.components.train.train import train

    with exit_with_user_errors():
        settings = step_settings(TrainSettings, "train", recipe, base_model=base_model)
        paths = {
            "model": Path(model.path),
            "history": Path(history.path),
            "report": Path(report.path),
        }
        results = train(settings, tokens=Path(tokens.path), **paths)
        model.metadata.update(results)
        for name, value in results.items():
            metrics.log_metric(name, value)


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def train_on_nodes(
    recipe: str,
    nodes: str,
    gpus_per_node: str,
    gpu_type: str,
    image: str,
    connection: str,
    tolerations: list,  # type: ignore[type-arg]
    node_selector: dict,  # type: ignore[type-arg]
    tokens: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    history: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Train the base model on many nodes, as a job of the cluster that this step follows.

    Args:
        recipe: The recipe, as YAML text or a URI; `train.cluster` has what is not given here.
        nodes: Nodes that train together; empty means as the recipe says.
        gpus_per_node: GPUs of each node; 0 trains on CPUs; empty means as the recipe says.
        gpu_type: The resource name of the GPUs.
        image: The image of the job's pods.
        connection: The Secret of the S3 data connection.
        tolerations: Tolerations of the job's pods.
        node_selector: Labels of the nodes.
        tokens: What `tokenize` made.
        model: A Hugging Face folder that transformers and vLLM load.
        history: Loss, learning rate, speed and the watched prompt, step by step.
        report: The loss curve and what it took, as a page.
        metrics: The last losses and the speed.
    """
    from pathlib import Path

    from nudge.components.common.core.recipe import step_settings
    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.train.settings import TrainSettings, on_nodes
    from nudge.components.train.train import train

    with exit_with_user_errors():
        job = {
            "nodes": nodes,
            "gpus_per_node": gpus_per_node,
            "gpu_resource": gpu_type,
            "image": image,
            "connection": connection,
            "tolerations": tolerations,
            "node_selector": node_selector,
        }
        settings = on_nodes(step_settings(TrainSettings, "train", recipe), job)
        paths = {
            "model": Path(model.path),
            "history": Path(history.path),
            "report": Path(report.path),
        }
        results = train(settings, tokens=Path(tokens.path), **paths)
        model.metadata.update(results)
        for name, value in results.items():
            metrics.log_metric(name, value)
