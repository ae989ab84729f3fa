"""The work of one rank: load, train, write."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch

from nudge.components.common.artifacts.model import ModelFacts, write_model_facts
from nudge.components.common.artifacts.schema import parse_artifact
from nudge.components.common.artifacts.tokens import read_tokens_manifest, verified_tokenizer
from nudge.components.common.core.progress import progress
from nudge.components.common.core.publish import published, write_atomic
from nudge.components.common.models import language_model
from nudge.components.common.models.base_model import model_sha256
from nudge.components.common.models.end_of_document import document_start_id
from nudge.components.common.models.serving_quantization import quantizable_layers
from nudge.components.common.preflight.machine import is_large
from nudge.components.common.spending.usage import plain_usage
from nudge.components.train.checkpoints.open_checkpoints import open_checkpoints
from nudge.components.train.checkpoints.training_state import TrainingState, identity
from nudge.components.train.data import PackedSplit
from nudge.components.train.limits import Limits
from nudge.components.train.loop import make_optimizer, planned_steps, train_loop, validation_loss
from nudge.components.train.memory import return_freed_memory
from nudge.components.train.models import network as networks
from nudge.components.train.models.adapt import adapt, initial_adapters
from nudge.components.train.models.model import (
    Start,
    check_length,
    check_tokenizer,
    check_vocabulary,
)
from nudge.components.train.models.quantization_cost import (
    bits_per_byte_of_a_nat,
    quantization_cost,
)
from nudge.components.train.models.quantized import parameter_count
from nudge.components.train.output.report import render_report
from nudge.components.train.output.result import facts_of, write_model
from nudge.components.train.output.served_weights import quantize_for_serving
from nudge.components.train.ranks import Ranks
from nudge.components.train.record import NoBar, NoTrainingLog, open_record
from nudge.components.train.settings import TrainSettings
from nudge.components.train.spending import Spending
from nudge.components.train.torchrun import threads_each


def train_one_rank(
    settings: TrainSettings,
    ranks: Ranks,
    tokens: Path,
    model: Path,
    history: Path,
    report: Path,
    limits: Limits,
) -> None:
    """Train as one of ``ranks``; the main rank writes the outputs. See `train`."""
    spending = Spending(ranks, limits)
    manifest = read_tokens_manifest(tokens)
    check_tokenizer(manifest, settings)
    precision = networks.precision_on(ranks.device, settings.precision)
    settings = dataclasses.replace(settings, precision=precision)
    threads = threads_each(ranks.local_world, settings)
    # Only a training on CPUs promises the same bits.
    language_model.set_up_torch(threads, settings.seed, deterministic=ranks.device.type == "cpu")
    tokenizer = language_model.load_tokenizer(verified_tokenizer(tokens))
    length, seed, begins = settings.sequence_length, settings.seed, document_start_id(tokenizer)
    packing = settings.packing
    training = PackedSplit(tokens, "train", length, seed, settings.prefix_share, begins, packing)
    validation = PackedSplit(tokens, "validation", length, seed, start=begins, packing=packing)
    steps = planned_steps(settings, training.rows)
    # Checkpoints close last: a run that succeeds removes them only once its model is published.
    with contextlib.ExitStack() as outer, contextlib.ExitStack() as stack:
        bar: Any = NoBar()
        model_part = history_part = Path()
        if ranks.main:
            bar = stack.enter_context(progress("train", total=steps, unit="steps"))
            model_part = stack.enter_context(published(model))
            history_part = stack.enter_context(published(history))
        bar.note(stage="loading the base model")
        start = Start(settings, tokenizer, manifest.vocab_size)
        network = _load_network(start, settings, ranks, manifest.vocab_size, tokenizer)
        optimizer = make_optimizer(network.model, settings)
        facts = facts_of(settings, manifest, start, network)
        facts["tokens"] = {"train": training.tokens, "validation": validation.tokens}
        record: Any = NoTrainingLog()
        if ranks.main:
            plain = dataclasses.asdict(settings)
            record = stack.enter_context(open_record(history_part, model.name, plain, steps))
        if settings.base_dtype in ("int8", "nf4"):
            bar.note(stage="measuring what the quantized base costs")
        facts["training"] |= quantization_cost(network, start, validation, tokenizer, settings)
        run = identity(settings, training, manifest.tokenizer_sha256, start.sha256, steps)
        checkpoints = outer.enter_context(
            open_checkpoints(settings, run, ranks, lambda stage: bar.note(stage=stage))
        )
        bar.note(stage="training")
        state = train_loop(
            network, optimizer, tokenizer, training, validation, settings, steps, record,
            checkpoints, bar, spending,
        )  # fmt: skip
        facts["selected_on"] = []
        if settings.keeps_best:
            checkpoints.restore_best(network, optimizer, state)
            if state.step > settings.validation_every:  # a single validation selects nothing
                facts["selected_on"] = validation.documents_of(settings.validation_sequences)
        bar.note(stage="writing the model")
        facts["training"] |= _training_facts(state, settings, ranks)
        write_model(model_part, start, network, settings, tokenizer, facts)
        loss = validation_loss(network, validation, settings) if settings.quantize else 0.0
        facts["training"]["usage"] = plain_usage(spending.total())
        if ranks.main:
            if settings.quantize:
                bar.note(stage=f"quantizing the model to {settings.quantize}")
                nat = bits_per_byte_of_a_nat(validation, tokenizer, settings)
                served = quantize_for_serving(
                    model_part, loss, nat, validation, settings, ranks.device
                )
                facts["training"]["served"] = dataclasses.asdict(served)
            facts["weights_sha256"] = model_sha256(model_part)
            write_model_facts(model_part, parse_artifact(facts, ModelFacts, "the model's facts"))
            write_atomic(report, render_report(facts, record.lines))
            record.report(report)


def _load_network(
    start: Start, settings: TrainSettings, ranks: Ranks, vocabulary: int, tokenizer: Any
) -> networks.Network:
    """The initial model on these ranks, checked against the tokens and the settings."""
    base = start.empty(settings.seed)
    if ranks.device.type == "cpu" and is_large(parameter_count(base)):
        return_freed_memory()
    check_vocabulary(base, vocabulary, settings)
    check_length(base, settings)
    if settings.quantize:
        quantizable_layers(base, settings.quantize)
    adapted = adapt(base, settings)

    def fill(model: Any, device: torch.device) -> None:
        start.fill(model, device, initial_adapters(model, settings))

    network = networks.Network(adapted, settings, ranks, fill)
    if start.folder is not None:
        uri = settings.base_model
        network.check(lambda model: language_model.check_generates(model, tokenizer, uri))
    network.check(language_model.check_loss)
    networks.check_document_masking(network, vocabulary)
    return network


def _training_facts(state: TrainingState, settings: TrainSettings, ranks: Ranks) -> dict[str, Any]:
    """What is known only after training."""
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "tokens_per_s": state.tokens / state.seconds,
        "ranks": ranks.world,
        "best_validation_loss": state.best_loss,
        "weights_of_step": (state.best_step if settings.keeps_best else None) or state.step,
    }
