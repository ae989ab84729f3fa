"""The step `train`: tokens and a base model in, a Hugging Face model folder out."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from nudge.components.common.core.publish import published, write_atomic
from nudge.components.common.core.step import step
from nudge.components.common.models.base_model import model_sha256
from nudge.components.train.settings import TrainSettings

SPLITS = ("train", "validation")


@step("train", outputs=("model", "history", "report"))
def train(
    settings: TrainSettings, *, tokens: Path, model: Path, history: Path, report: Path
) -> dict[str, Any]:
    """Train a base model, or a fresh one, on token shards.

    ``tokens`` is a tokens artifact. ``model`` becomes a Hugging Face folder (config, tokenizer,
    safetensors, model card) with ``nudge.json``, which tells what it was made of, and the places in
    the validation split of the documents whose loss chose the weights (``selected_on``); after LoRA
    the adapter is beside it in ``adapter/``. ``history`` becomes a folder of ``metrics.jsonl`` (a
    line a step: loss in nats per token, learning rate, gradient norm, tokens, speed, memory;
    validation losses), ``probes.jsonl`` (the watched prompt) and ``tensorboard/``; ``report`` an
    HTML page.

    Where torchrun's variables are set, this is one rank of several, and the first one writes.
    Raises `UserError` on a tokenizer that does not fit the model, on a loss that is not finite, on
    too little memory, and on checkpoints that are of another run.
    """
    from nudge.components.common.models.base_model import resolved
    from nudge.components.train.result import results
    from nudge.components.train.torchrun import processes_wanted, run_ranks

    # What is served may change while this trains: all ranks and the lineage mean the same model.
    settings = dataclasses.replace(settings, base_model=resolved(settings.base_model))
    paths = {"tokens": tokens, "model": model, "history": history, "report": report}
    if settings.launcher != "local":
        from nudge.components.train.cluster.launch import launch

        launch(settings, paths)
    elif count := processes_wanted(settings):
        run_ranks(count, settings, paths)
    else:
        train_rank(settings, **paths)
    return results(model, history)


def train_rank(
    settings: TrainSettings, *, tokens: Path, model: Path, history: Path, report: Path
) -> None:
    """Train as this rank of those that torchrun's variables name, or alone; see `train`."""
    from nudge.components.train.memory import explain_out_of_memory
    from nudge.components.train.ranks import joined_ranks

    with explain_out_of_memory(settings), joined_ranks() as ranks:
        _train(settings, ranks, tokens, model, history, report)


def _train(
    settings: TrainSettings, ranks: Any, tokens: Path, model: Path, history: Path, report: Path
) -> None:
    from nudge.components.common.artifacts.model import ModelFacts, write_model_facts
    from nudge.components.common.artifacts.schema import parse_artifact
    from nudge.components.common.artifacts.tokens import read_tokens_manifest, verified_tokenizer
    from nudge.components.common.core.progress import progress
    from nudge.components.common.models import language_model
    from nudge.components.common.models.end_of_document import document_start_id
    from nudge.components.train.adapt import adapt
    from nudge.components.train.checkpoints.checkpoints import identity, open_checkpoints
    from nudge.components.train.data import PackedSplit
    from nudge.components.train.loop import make_optimizer, planned_steps, train_loop
    from nudge.components.train.model import (
        Start,
        check_length,
        check_tokenizer,
        check_vocabulary,
    )
    from nudge.components.train.network import Network, check_document_masking, precision_on
    from nudge.components.train.record import NoBar, NoTrainingLog, open_record
    from nudge.components.train.report import render_report
    from nudge.components.train.result import facts_of, write_model
    from nudge.components.train.torchrun import threads_each

    manifest = read_tokens_manifest(tokens)
    check_tokenizer(manifest, settings)
    precision = precision_on(ranks.device, settings.precision)
    settings = dataclasses.replace(settings, precision=precision)
    language_model.set_up_torch(threads_each(ranks.local_world, settings), settings.seed)
    tokenizer = language_model.load_tokenizer(verified_tokenizer(tokens))
    length, seed, begins = settings.sequence_length, settings.seed, document_start_id(tokenizer)
    split = [
        PackedSplit(tokens, "train", length, seed, settings.prefix_share, begins),
        PackedSplit(tokens, "validation", length, seed, start=begins),
    ]
    steps = planned_steps(settings, split[0].rows)
    with contextlib.ExitStack() as kept, contextlib.ExitStack() as stack:
        bar: Any = NoBar()
        model_part = history_part = Path()
        if ranks.main:
            bar = stack.enter_context(progress("train", total=steps, unit="steps"))
            model_part = stack.enter_context(published(model))
            history_part = stack.enter_context(published(history))
        bar.note(stage="loading the base model")
        start = Start(settings, tokenizer, manifest.vocab_size)
        base = start.model(seed)
        check_vocabulary(base, manifest.vocab_size, settings)
        language_model.check_loss(base)
        check_length(base, settings)
        network = Network(adapt(base, settings, sharded=ranks.world > 1), settings, ranks)
        check_document_masking(network, manifest.vocab_size)
        optimizer = make_optimizer(network.model, settings)
        facts = facts_of(settings, manifest, start, network)
        facts["tokens"] = {name: part.tokens for name, part in zip(SPLITS, split, strict=True)}
        record: Any = NoTrainingLog()
        if ranks.main:
            plain = dataclasses.asdict(settings)
            record = stack.enter_context(open_record(history_part, model.name, plain, steps))
        same = identity(settings, split[0], manifest.tokenizer_sha256, start.sha256, steps)
        checkpoints = kept.enter_context(
            open_checkpoints(settings, same, ranks, lambda stage: bar.note(stage=stage))
        )
        bar.note(stage="training")
        state = train_loop(
            network, optimizer, tokenizer, split[0], split[1], settings, steps, record,
            checkpoints, bar,
        )  # fmt: skip
        facts["selected_on"] = []
        if settings.keeps_best:
            checkpoints.restore_best(network, optimizer, state)
            if state.step > settings.validation_every:  # else there was one, and no choice
                facts["selected_on"] = split[1].documents_of(settings.validation_sequences)
        bar.note(stage="writing the model")
        weights = network.full_state()
        facts["training"] |= {
            "steps": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_s": state.tokens / state.seconds,
            "ranks": ranks.world,
            "best_validation_loss": state.best_loss,
            "weights_of_step": (state.best_step if settings.keeps_best else None) or state.step,
        }
        if ranks.main:
            write_model(model_part, start, weights, settings, tokenizer, facts)
            facts["weights_sha256"] = model_sha256(model_part)
            write_model_facts(model_part, parse_artifact(facts, ModelFacts, "the model's facts"))
            write_atomic(report, render_report(facts, record.lines))
