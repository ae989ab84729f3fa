"""The step `train`: from tokens and a base model to a Hugging Face model folder."""

import dataclasses
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.clients.tracking import track_history
from nudge.components.common.core.step import step
from nudge.components.common.spending.usage import NOTHING, Usage, add, of_earlier_steps, usage_of
from nudge.components.train.limits import NO_LIMITS, Limits
from nudge.components.train.settings import TrainSettings


@step("train", outputs=("model", "history", "report"), no_inputs=("limits",))
def train(
    settings: TrainSettings,
    limits: Limits = NO_LIMITS,
    /,
    *,
    tokens: Path,
    model: Path,
    history: Path,
    report: Path,
) -> dict[str, Any]:
    """Train a base model, or a fresh one, on token shards.

    ``tokens`` is a tokens artifact. The outputs are:

    - ``model``: a Hugging Face folder (config, tokenizer, safetensors, model card; after LoRA the
      adapter, in ``adapter/``). Its ``nudge.json`` records the origins of the model, and in
      ``selected_on`` the indices in the validation split of the documents whose loss selected the
      weights.
    - ``history``: a folder with ``metrics.jsonl`` (one line per step: loss in nats per token,
      learning rate, gradient norm, tokens, speed, memory; and the validation losses),
      ``probes.jsonl`` (the watched prompt) and ``tensorboard/``.
    - ``report``: an HTML page.

    If torchrun's variables are set, this process is one rank of several, and rank 0 writes. Raises
    `UserError` if the tokenizer does not fit the model, the loss is not finite, memory runs out, a
    checkpoint is from another run, or the run needs more than its ``limits`` (found out once the
    speed is known, and at each checkpoint).
    """
    from nudge.components.common.models.base_model import resolved
    from nudge.components.train.output.result import results
    from nudge.components.train.torchrun import processes_wanted, run_ranks

    # The served model may change meanwhile; resolve it once for all ranks and the lineage.
    settings = dataclasses.replace(settings, base_model=resolved(settings.base_model))
    paths = {"tokens": tokens, "model": model, "history": history, "report": report}
    spent = sum(of_earlier_steps(reused=False).values(), NOTHING)
    limits = dataclasses.replace(limits, used=spent)
    if settings.launcher != "local":
        from nudge.components.train.cluster.launch import launch

        launch(settings, paths, limits)
        track_history(history, model.name, dataclasses.asdict(settings), report)
        # Its wall time is this step's own.
        add(dataclasses.replace(training_usage(model), seconds=0.0))
    elif count := processes_wanted(settings):
        run_ranks(count, settings, paths, limits)
        # The ranks are children of this process, which counts all but their GPUs.
        add(Usage(gpu_seconds=training_usage(model).gpu_seconds))
    else:
        train_rank(settings, paths, limits)
    return results(model, history)


def training_usage(model: Path) -> Usage:
    """What the ranks that trained a model used, by its facts."""
    return usage_of(read_model_facts(model).training.usage) or NOTHING


def train_rank(settings: TrainSettings, paths: dict[str, Path], limits: Limits) -> None:
    """Train as the rank that torchrun's variables describe, or alone; ``paths`` are the tokens and
    the outputs of `train`."""
    from nudge.components.train.memory import explain_out_of_memory
    from nudge.components.train.one_rank import train_one_rank
    from nudge.components.train.ranks import joined_ranks

    with explain_out_of_memory(settings), joined_ranks() as ranks:
        train_one_rank(settings, ranks, **paths, limits=limits)
