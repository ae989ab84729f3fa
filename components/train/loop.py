"""The training loop: next-token prediction, AdamW, a schedule; every figure is kept."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nudge.components.common.errors import UserError
from nudge.components.common.language_model import (
    head_weight,
    hidden_states,
    likeliest,
    next_token_probabilities,
    single_token,
)
from nudge.components.common.progress import Progress
from nudge.components.train.data import IGNORED, PackedSplit, Rows
from nudge.components.train.settings import TrainSettings
from nudge.kernels import fused_linear_cross_entropy


@dataclass
class Trained:
    """What the loop did: optimizer steps, tokens trained on and seconds."""

    steps: int
    tokens: int
    seconds: float


def planned_steps(settings: TrainSettings, rows: int) -> int:
    """Optimizer steps for the epochs asked for, at least one, at most `max_steps`."""
    steps = max(1, math.ceil(settings.epochs * rows / settings.batch_sequences))
    return min(steps, settings.max_steps) if settings.max_steps else steps


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Linear warm-up, then cosine or warm-up-stable-decay (Hu et al. 2024, arXiv 2404.06395,
    with a linear decay): a pure function of the step (counted from 0)."""
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
    """AdamW that decays only tensors of two or more dimensions."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def train_loop(
    model: Any,
    tokenizer: Any,
    training: PackedSplit,
    validation: PackedSplit,
    settings: TrainSettings,
    history: Path,
    bar: Progress,
    steps: int,
) -> Trained:
    """Train ``model`` in place for ``steps`` optimizer steps; metrics.jsonl and probes.jsonl go to
    ``history``.

    Raises `UserError` before the step whose loss or gradient is not finite.
    """
    optimizer = make_optimizer(model, settings)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tokens, started = 0, time.monotonic()
    with _writer(history / "metrics.jsonl") as log, _writer(history / "probes.jsonl") as log_probe:
        watch(model, tokenizer, settings, 0, log_probe)
        log({"step": 0, "validation_loss": validation_loss(model, validation, settings)})
        for step in range(steps):
            rows = training.batch(0, step * settings.batch_sequences, settings.batch_sequences)
            loss, valid = accumulate(model, rows, settings)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm))
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise UserError(
                    f"training stopped before step {step + 1}: loss {loss}, gradient norm {norm} "
                    f"(rows {step * settings.batch_sequences} and on of seed {settings.seed}); "
                    f"lower train.learning_rate, now {settings.learning_rate:g}"
                )
            rate = learning_rate(settings, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            tokens += valid
            seconds = time.monotonic() - started
            figures = {"step": step + 1, "tokens": tokens, "loss": loss, "lr": rate}
            log({**figures, "grad_norm": norm, "seconds": seconds})
            left = seconds / (step + 1) * (steps - step - 1)
            bar.advance(1, loss=loss, tokens_per_s=tokens / seconds, eta_s=round(left))
            last = step + 1 == steps
            if last or (step + 1) % settings.watch_every == 0:
                watch(model, tokenizer, settings, step + 1, log_probe)
            due = settings.validation_every and (step + 1) % settings.validation_every == 0
            if last or due:
                held_out = validation_loss(model, validation, settings)
                log({"step": step + 1, "validation_loss": held_out})
    return Trained(steps, tokens, time.monotonic() - started)


def accumulate(model: Any, rows: Rows, settings: TrainSettings) -> tuple[float, int]:
    """Add the gradients of one batch, in micro-batches; returns its loss and its valid tokens.

    The loss, in nats per token, is normalised by the valid tokens of the whole batch, so that the
    size of the micro-batches does not change the result.
    """
    valid = int((rows.targets != IGNORED).sum())
    loss = 0.0
    for first in range(0, len(rows.inputs), settings.micro_batch_sequences):
        micro = slice(first, first + settings.micro_batch_sequences)
        part = _summed_loss(model, rows, micro, settings) / valid
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
    return loss, valid


@torch.no_grad()
def validation_loss(model: Any, split: PackedSplit, settings: TrainSettings) -> float:
    """Nats per token over the first `validation_sequences` rows of a split."""
    model.eval()
    rows = split.batch(0, 0, min(settings.validation_sequences, split.rows))
    total = 0.0
    for first in range(0, len(rows.inputs), settings.micro_batch_sequences):
        micro = slice(first, first + settings.micro_batch_sequences)
        total += _summed_loss(model, rows, micro, settings).item()
    model.train()
    return total / int((rows.targets != IGNORED).sum())


def watch(
    model: Any,
    tokenizer: Any,
    settings: TrainSettings,
    step: int,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Write down what the model expects after the watched prompt, if there is one."""
    if settings.watch is None:
        return
    model.eval()
    with _precision(settings):
        ids = tokenizer(settings.watch.prompt)["input_ids"]
        probabilities = next_token_probabilities(model, ids)
    model.train()
    p = probabilities[single_token(tokenizer, settings.watch.target)].item()
    log({"step": step, "p": p, "loss": -math.log(p), "top": likeliest(probabilities, tokenizer)})


def _summed_loss(model: Any, rows: Rows, micro: slice, settings: TrainSettings) -> torch.Tensor:
    with _precision(settings):
        hidden = hidden_states(model, rows.inputs[micro], rows.positions[micro])
        weight = head_weight(model)
        return fused_linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            rows.targets[micro].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            logit_softcap=getattr(model.config, "final_logit_softcapping", None) or 0.0,
        )


def _precision(settings: TrainSettings) -> contextlib.AbstractContextManager[Any]:
    if settings.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    with path.open("w", encoding="utf-8", buffering=1) as file:
        yield lambda values: print(json.dumps(values), file=file)
