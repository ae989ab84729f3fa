"""Explains a loss or gradient that is not finite: where it began, its likely cause, the remedy."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from nudge.components.train.data import Rows
from nudge.components.train.models.network import Network
from nudge.components.train.settings import TrainSettings

LARGE = {torch.float16: 2.0**7}
"""Values at least this large have squares near the dtype's limit; 2^60 for float32 and bfloat16,
which share their range."""

Kind = Literal["overflow", "data", "hardware", "weights"]


@dataclass(frozen=True)
class Finding:
    """The first tensor that is not finite, its likely cause, and the evidence for it."""

    kind: Kind
    tensor: str
    reason: str

    def sentence(self, settings: TrainSettings) -> str:
        """One sentence for a person: the finding and the remedy."""
        advice = {
            "overflow": f"lower train.learning_rate, now {settings.learning_rate:g}, or raise "
            f"train.warmup_share, now {settings.warmup_share:g}",
            "data": "inspect the text of that row, and remove it from the data",
            "hardware": "rerun the same command to resume from the last checkpoint; if it happens "
            "twice, test this machine's memory or GPU, or train on another machine",
            "weights": "use an undamaged base model, or resume from an older checkpoint",
        }
        cause = "damaged weights" if self.kind == "weights" else self.kind
        found = f"the first values that are not finite are in {self.tensor}"
        return f"{found}: this looks like {cause} ({self.reason}); {advice[self.kind]}"


def find(network: Network, micro_batches: list[Rows], first_row: int) -> Finding:
    """Recompute the batch and look for the first tensor that is not finite.

    ``first_row`` is the number of the batch's first row in its epoch. On entry the model has the
    unclipped gradients of the failed step; they are overwritten. Sharded models are not recomputed,
    because each rank has only a part of them.
    """
    named = list(network.model.named_parameters())
    for name, parameter in named:
        if not _finite(parameter):
            return Finding("weights", name, "they were not finite before this step")
    bad = [name for name, p in named if p.grad is not None and not _finite(p.grad)]
    gradient = f"the gradient of {bad[-1]}" if bad else "the loss"
    if network.sharded:
        return Finding("overflow", gradient, "the usual cause; sharded models are not searched")
    for parameter in network.model.parameters():
        parameter.grad = None
    first = first_row
    for rows in micro_batches:
        with _watched(network.model) as seen:
            loss = network.local_loss(rows)
            seen.forward_done = True
            if seen.found is None and not _finite(loss):
                seen.found = Finding("overflow", "the loss", "its logits are too large")
            if seen.found is None:
                loss.backward()  # type: ignore[no-untyped-call]
        if seen.found is not None:
            return _with_row(seen.found, first, seen.rows, len(rows.inputs))
        for name, parameter in reversed(named):
            if parameter.grad is not None and not _finite(parameter.grad):
                tensor = f"the gradient of {name}"
                largest = max(seen.largest, _largest(parameter))
                return Finding("overflow", tensor, f"the gradients before it reach {largest:.2g}")
        first += len(rows.inputs)
    if network.ranks.world > 1:
        return Finding(
            "overflow", gradient, "it began in the rows of another rank, whose message says more"
        )
    return Finding(
        "hardware", gradient, "the same rows give finite values when they are recomputed"
    )


class _Seen:
    def __init__(self) -> None:
        self.found: Finding | None = None
        self.rows: list[int] = []
        self.largest = 0.0
        self.forward_done = False


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Seen]:
    """Record the first module whose output, or output gradient, is not finite."""
    seen, handles = _Seen(), []

    def of_gradient(name: str) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            if seen.found is None and not _finite(gradient):
                kind: Kind = "overflow" if seen.largest >= _large(gradient.dtype) else "data"
                reason = f"the gradients before it reach {seen.largest:.2g}"
                seen.found = Finding(kind, f"the gradient of the output of {name}", reason)
                seen.rows = _bad_rows(gradient)
            elif seen.found is None:
                seen.largest = max(seen.largest, _largest(gradient))

        return look

    def of_output(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not isinstance(value, torch.Tensor) or seen.found is not None or seen.forward_done:
                return
            if _finite(value):
                if value.requires_grad:
                    value.register_hook(of_gradient(name))
                return
            floats = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
            operands = [*floats, *module.parameters(recurse=False)]
            largest = max(map(_largest, operands), default=0.0)
            kind: Kind = "overflow" if largest >= _large(value.dtype) else "data"
            reason = f"its inputs and weights reach {largest:.2g}"
            seen.found = Finding(kind, f"the output of {name}", reason)
            seen.rows = _bad_rows(value)

        return look

    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_hook(of_output(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _with_row(found: Finding, first: int, bad: list[int], count: int) -> Finding:
    """The finding with the row in which it began.

    If every row turns bad at once although the values before were modest, the processor is at
    fault, not the text.
    """
    if found.kind == "data" and len(bad) == count > 1:
        reason = f"{found.reason}, and every row is affected"
        return Finding("hardware", found.tensor, reason)
    where = f" in row {first + bad[0]}" if bad else ""
    return Finding(found.kind, f"{found.tensor}{where}", found.reason)


def _bad_rows(value: torch.Tensor) -> list[int]:
    if value.dim() < 3:  # the tokens of all rows share one dimension
        return []
    return (~value.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist()


def _finite(value: torch.Tensor) -> bool:
    local = value.to_local() if hasattr(value, "to_local") else value
    return bool(local.detach().isfinite().all())


def _largest(value: torch.Tensor) -> float:
    largest = float(value.detach().abs().max()) if value.numel() else 0.0
    return largest if math.isfinite(largest) else 0.0


def _large(dtype: torch.dtype) -> float:
    return LARGE.get(dtype, 2.0**60)
