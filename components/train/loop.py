"""The training loop: next-token prediction with AdamW and a schedule; logs every figure."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.progress import Progress
from nudge.components.common.models.language_model import likeliest, target_ids, target_probability
from nudge.components.common.spending.usage import plain_usage
from nudge.components.train.bad_numbers import find
from nudge.components.train.checkpoints.checkpoints import Checkpoints
from nudge.components.train.checkpoints.training_state import TrainingState
from nudge.components.train.data import IGNORED, PackedSplit, Rows, tokens_in, without_padding
from nudge.components.train.meter import Meter
from nudge.components.train.models.network import Network
from nudge.components.train.ranks import Ranks
from nudge.components.train.record import NoTrainingLog, TrainingLog
from nudge.components.train.settings import TrainSettings
from nudge.components.train.spending import Spending
from nudge.components.train.stopping import Stopping


@dataclass
class Loss:
    """The loss of one batch: nats per learned token, learned tokens over all ranks, and the
    contribution of each micro-batch of this rank. ``read`` also counts masked tokens."""

    value: float
    tokens: int
    parts: list[float] = field(default_factory=list)
    read: int = 0


def planned_steps(settings: TrainSettings, rows: int) -> int:
    """Optimizer steps for the configured epochs: at least one, at most `max_steps`."""
    steps = max(1, math.ceil(settings.epochs * rows / settings.batch_sequences))
    return min(steps, settings.max_steps) if settings.max_steps else steps


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Linear warm-up, then cosine or warm-up-stable-decay (Hu et al. 2024, arXiv 2404.06395, with a
    linear decay). A pure function of the step (counted from 0)."""
    warmup = math.ceil(settings.warmup_share * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    low = settings.final_learning_rate_share
    if settings.schedule == "wsd":
        decay = min(math.ceil(settings.decay_share * steps), steps - warmup)
        left = min(1.0, (steps - step) / max(1, decay))
        return settings.learning_rate * (low + (1 - low) * left)
    done = (step - warmup) / max(1, steps - warmup)
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: Any, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) that decays only tensors of two or more
    dimensions. Its state is allocated here, so that a checkpoint can be loaded into it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, fused=True
    )
    for parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def train_loop(
    network: Network,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    training: PackedSplit,
    validation: PackedSplit,
    settings: TrainSettings,
    steps: int,
    record: TrainingLog | NoTrainingLog,
    checkpoints: Checkpoints,
    bar: Progress,
    spending: Spending,
) -> TrainingState:
    """Train the network's model in place up to optimizer step ``steps``; return the final state.

    Training starts from the newest checkpoint if there is one. Raises `UserError` before a step
    whose loss or gradient is not finite, and, after SIGTERM or when the budget does not suffice,
    once a checkpoint is written.
    """
    ranks = network.ranks
    state = checkpoints.resume(network, optimizer, record) or TrainingState()
    spending.resume(state)
    bar.advance(state.step)
    started = time.monotonic() - state.seconds
    if state.step == 0:
        _watch(network, tokenizer, settings, 0, record)
        first = validation_loss(network, validation, settings)
        record.metric({"step": 0, "validation_loss": first})
    bfloat16 = settings.precision == "bfloat16"
    meter = Meter(network.model, settings.sequence_length, bfloat16, ranks.device, ranks.world)
    with (
        Stopping(checkpoints.persistent) as stopping,
        _batches(training, settings, ranks, state.step, steps) as next_batch,
    ):
        while state.step < steps and not _stops_early(state, settings):
            step = state.step
            asked = time.monotonic()
            rows = next_batch()
            waited = time.monotonic() - asked
            ranks.seed(settings.seed, step)
            loss: Loss | None = None
            if not stopping.agreed(ranks):
                loss = accumulate(network, rows, settings, stopping)
            if loss is None:
                optimizer.zero_grad()
                checkpoints.save(network, optimizer, state, record)
                raise Transient(
                    f"stopped by SIGTERM after step {step}; the checkpoint is "
                    f"{checkpoints.finish(state)}: rerun the same command to resume from it"
                )
            rate = learning_rate(settings, step, steps)
            norm = _update(network, optimizer, rate, training, rows, step, loss)
            state.step, state.tokens = step + 1, state.tokens + loss.tokens
            state.seconds = time.monotonic() - started
            speed = meter.step(loss.read, waited, steps - state.step)
            figures = {"step": state.step, "tokens": state.tokens, "loss": loss.value}
            record.metric(
                {**figures, "lr": rate, "grad_norm": norm, "seconds": state.seconds, **speed}
            )
            _show(bar, loss.value, speed)
            if state.step == steps or state.step % settings.watch_every == 0:
                _watch(network, tokenizer, settings, state.step, record)
            better, every = False, settings.validation_every
            if state.step == steps or (every and state.step % every == 0):
                better = _validate(network, validation, settings, state, record, checkpoints)
            due = state.step % settings.checkpoint_every == 0
            over = spending.after_step(state, steps) if state.step < steps else ""
            if state.step < steps and (due or over or (better and settings.keeps_best)):
                used = spending.total()
                state.used = plain_usage(used)
                checkpoints.save(network, optimizer, state, record)
                if over := over or spending.at_checkpoint(used):
                    raise spending.stop(over, state, steps, checkpoints.finish(state))
    checkpoints.wait_for_last(state)
    return state


def _update(
    network: Network,
    optimizer: torch.optim.Optimizer,
    rate: float,
    training: PackedSplit,
    rows: Rows,
    step: int,
    loss: Loss,
) -> float:
    """Clip the gradients and take an optimizer step; return the gradient norm before clipping.

    Raises `UserError` if the loss or the norm is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
    if not math.isfinite(loss.value) or not math.isfinite(norm):
        # Search before clipping, which would spread the fault to every gradient.
        raise UserError(_not_finite(network, training, rows, step, loss, norm))
    torch.nn.utils.clip_grads_with_norm_(parameters, network.settings.clip_norm, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def _validate(
    network: Network,
    validation: PackedSplit,
    settings: TrainSettings,
    state: TrainingState,
    record: TrainingLog | NoTrainingLog,
    checkpoints: Checkpoints,
) -> bool:
    """Log the validation loss; return whether it is the best so far."""
    loss = validation_loss(network, validation, settings)
    if settings.keeps_best:
        checkpoints.wait_for_last(state)
    record.metric({"step": state.step, "validation_loss": loss})
    return state.validated(loss)


def accumulate(
    network: Network, rows: Rows, settings: TrainSettings, stopping: Stopping | None = None
) -> Loss | None:
    """Accumulate the gradients of one batch in micro-batches; None once ``stopping`` is requested.

    ``rows`` are this rank's. The loss is normalized by the valid tokens of the full batch, over all
    micro-batches and ranks, so that their sizes and numbers do not change the result.
    """
    ranks = network.ranks
    tokens, read = ranks.sum(int((rows.targets != IGNORED).sum()), tokens_in(rows))
    parts: list[torch.Tensor] = []
    for micro, last in _micro_batches(rows, settings):
        if ranks.world == 1 and stopping is not None and stopping.requested:
            return None
        with network.last_of_batch(last):
            part = network.summed_loss(micro) / tokens
            # FSDP and DDP average over ranks; this undoes the division, to get the sum.
            (part * ranks.world if ranks.world > 1 else part).backward()
        parts.append(part.detach())
    contributions = [part.item() for part in parts]
    return Loss(ranks.sum(sum(contributions))[0], int(tokens), contributions, int(read))


@torch.no_grad()
def validation_loss(network: Network, split: PackedSplit, settings: TrainSettings) -> float:
    """Nats per token over the first `validation_sequences` rows of a split, over all ranks."""
    network.model.eval()
    rows = rank_rows(split, 0, min(settings.validation_sequences, split.rows), network.ranks)
    micro_batches = _micro_batches(rows, settings)
    total = sum(network.summed_loss(micro).item() for micro, _ in micro_batches)
    network.model.train()
    total, tokens = network.ranks.sum(total, int((rows.targets != IGNORED).sum()))
    return total / tokens


def rank_rows(split: PackedSplit, step: int, count: int, ranks: Ranks) -> Rows:
    """This rank's slice of the ``count`` rows of ``step``.

    Slices are padded to the same number of rows, so that all ranks make the same number of
    collective calls.
    """
    rows = split.step_batch(step, count, ranks.rank, ranks.world)
    missing = -(-count // ranks.world) - len(rows.inputs)
    if missing == 0:
        return rows
    pad = torch.nn.functional.pad
    return Rows(
        pad(rows.inputs, (0, 0, 0, missing)),
        pad(rows.targets, (0, 0, 0, missing), value=IGNORED),
        pad(rows.positions, (0, 0, 0, missing)),
    )


def _micro_batches(rows: Rows, settings: TrainSettings) -> Iterator[tuple[Rows, bool]]:
    """Micro-batches, each with a flag that is true for the last.

    Without packing most rows end in padding, so a micro-batch is cut to its longest row, unless the
    layers are compiled for one shape.
    """
    size = settings.micro_batch_sequences
    for first in range(0, len(rows.inputs), size):
        part = slice(first, first + size)
        micro = Rows(rows.inputs[part], rows.targets[part], rows.positions[part])
        if not settings.packing and not settings.compile:
            micro = without_padding(micro)
        yield micro, first + size >= len(rows.inputs)


@contextmanager
def _batches(
    split: PackedSplit, settings: TrainSettings, ranks: Ranks, start: int, steps: int
) -> Iterator[Callable[[], Rows]]:
    """Yield a function that returns this rank's next batch and prepares the one after it in a
    background thread."""
    size = settings.batch_sequences
    with ThreadPoolExecutor(1) as worker:
        pending = [worker.submit(rank_rows, split, start, size, ranks)]

        def next_batch() -> Rows:
            nonlocal start
            start += 1
            rows = pending.pop().result()
            if start < steps:
                pending.append(worker.submit(rank_rows, split, start, size, ranks))
            return rows

        yield next_batch


def _watch(
    network: Network,
    tokenizer: Any,
    settings: TrainSettings,
    step: int,
    record: TrainingLog | NoTrainingLog,
) -> None:
    """Log what the model predicts after the watched prompt, if one is configured."""
    if settings.watch is None:
        return
    prompt = tokenizer(settings.watch.prompt)["input_ids"]
    target = target_ids(tokenizer, settings.watch.target)
    network.model.eval()
    probabilities = network.probabilities(prompt, target)
    network.model.train()
    p = target_probability(probabilities, target)
    loss = -math.log(p) if p > 0 else None
    top = likeliest(probabilities[0], tokenizer)
    record.probe({"step": step, "p": p, "loss": loss, "top": top})


def _stops_early(state: TrainingState, settings: TrainSettings) -> bool:
    return bool(settings.early_stopping) and state.worse_in_a_row >= settings.early_stopping


def _show(bar: Progress, loss: float, speed: dict[str, float | None]) -> None:
    shown = {
        "loss": loss,
        "tokens_per_s": speed["tokens_per_s"],
        "eta_s": round(speed["eta_s"] or 0),
    }
    bar.advance(1, **shown, mfu="n/a" if speed["mfu"] is None else speed["mfu"])


def _not_finite(
    network: Network, split: PackedSplit, rows: Rows, step: int, loss: Loss, norm: float
) -> str:
    """The message about a batch that ended the training: which one it is, and why."""
    settings, ranks = network.settings, network.ranks
    epoch, row = divmod(step * settings.batch_sequences, split.rows)
    ranks.seed(settings.seed, step)  # repeat the same dropout
    micro = [part for part, _ in _micro_batches(rows, settings)]
    found = find(network, micro, row if ranks.world == 1 else 0)
    return (
        f"training stopped before step {step + 1}: loss {loss.value}, gradient norm {norm} (batch: "
        f"{settings.batch_sequences} rows from row {row} of epoch {epoch}, seed {settings.seed}); "
        f"{found.sentence(settings)}"
    )
