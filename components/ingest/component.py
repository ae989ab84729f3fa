from kfp import dsl

from nudge.components.common.core.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def ingest(
    recipe: str,
    data_uri: str,
    model_name: str,
    corpus: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    version: str = "",
    registers: bool = False,
    base_model: str = "",
    training_memory: str = "",
    size: str = "",
    gpu_count: str = "",
) -> int:
    """Read text from its sources, clean it, drop duplicates and split it.

    Args:
        recipe: The recipe, as YAML text or a URI.
        data_uri: Where the text is; empty means as the recipe says.
        model_name: The model whose served version counts; empty means as the recipe says.
        corpus: Documents for training and validation, with exact counts.
        report: What came in, what was dropped and why.
        metrics: How many documents were read, kept and held out, and dropped by reason.
        version: The name of the version that this run makes; empty means the run's id.
        registers: Whether this run publishes a model; what that needs is then checked first.
        base_model: The model that will be trained; empty means as the recipe says.
        training_memory: The memory limit of the pod that trains, by size; empty checks none.
        size: The size of that pod.
        gpu_count: The GPUs of that pod.

    Returns:
        0 if only new text counts (`only_new`) and the served version has seen all of it, else 1.
    """
    from pathlib import Path

    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.common.preflight.checks import Way, preflight
    from nudge.components.common.preflight.pod import sized_pod
    from nudge.components.ingest.account import check_held_out
    from nudge.components.ingest.ingest import ingest
    from nudge.components.ingest.settings import ingest_settings

    with exit_with_user_errors():
        preflight(
            recipe,
            Way.STEP,
            version=version,
            model_name=model_name,
            base_model=base_model,
            pod=sized_pod(training_memory, size, gpu_count),
            publishes=registers,
        )
        overrides = {"data_uri": data_uri, "model_name": model_name}
        settings = ingest_settings(recipe, **overrides)
        result = ingest(settings, corpus=Path(corpus.path), report=Path(report.path))
        check_held_out(result, settings)
        dropped = result.pop("dropped")
        corpus.metadata.update(result)
        for name in ("read", "documents", "validation_documents"):
            metrics.log_metric(name, result[name])
        for reason, count in dropped.items():
            metrics.log_metric(f"dropped_{reason}", count)
    return int(result["new"])
