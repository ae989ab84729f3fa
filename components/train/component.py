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
    """Train a model on the tokens, in this step's own pod.

    Args:
        recipe: The recipe, as YAML text or a URI.
        base_model: The model to start from; empty takes the recipe's.
        tokens: The tokens artifact from `tokenize`.
        model: A Hugging Face model folder that transformers and vLLM load.
        history: Loss, learning rate, speed and the watched prompt at each step.
        report: An HTML page with the loss curve, time, memory and settings.
        metrics: The final losses and the speed.
    """
    from pathlib import Path

    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.common.preflight.packages import check_packages
    from nudge.components.train.limits import limits_of
    from nudge.components.train.room import check_room
    from nudge.components.train.settings import train_settings
    from nudge.components.train.train import train

    with exit_with_user_errors():
        check_packages(recipe)  # evaluate runs in the same image, hours later
        settings = train_settings(recipe, base_model=base_model)
        check_room(settings, Path(model.path))
        paths = {
            "model": Path(model.path),
            "history": Path(history.path),
            "report": Path(report.path),
        }
        results = train(settings, limits_of(recipe), tokens=Path(tokens.path), **paths)
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
    """Train a model on many nodes: create a job on the cluster and follow it to its end.

    Args:
        recipe: The recipe, as YAML text or a URI; its `train.cluster` sets what is empty here.
        nodes: Number of nodes that train together; empty takes the recipe's.
        gpus_per_node: GPUs per node; 0 trains on CPUs; empty takes the recipe's.
        gpu_type: Resource name of the GPUs, such as nvidia.com/gpu; empty takes the recipe's.
        image: Image of the job's pods; empty takes the recipe's.
        connection: Secret of the S3 data connection; empty takes the recipe's.
        tolerations: Tolerations of the job's pods; empty takes the recipe's.
        node_selector: Labels of the nodes for the job's pods; empty takes the recipe's.
        tokens: The tokens artifact from `tokenize`.
        model: A Hugging Face model folder that transformers and vLLM load.
        history: Loss, learning rate, speed and the watched prompt at each step.
        report: An HTML page with the loss curve, time, memory and settings.
        metrics: The final losses and the speed.
    """
    from pathlib import Path

    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.common.preflight.packages import check_packages
    from nudge.components.train.limits import limits_of
    from nudge.components.train.settings import on_nodes, train_settings
    from nudge.components.train.train import train

    with exit_with_user_errors():
        check_packages(recipe)  # evaluate runs in an image like this one, hours later
        job = {
            "nodes": nodes,
            "gpus_per_node": gpus_per_node,
            "gpu_resource": gpu_type,
            "image": image,
            "connection": connection,
            "tolerations": tolerations,
            "node_selector": node_selector,
        }
        settings = on_nodes(train_settings(recipe), job)
        paths = {
            "model": Path(model.path),
            "history": Path(history.path),
            "report": Path(report.path),
        }
        results = train(settings, limits_of(recipe), tokens=Path(tokens.path), **paths)
        model.metadata.update(results)
        for name, value in results.items():
            metrics.log_metric(name, value)
