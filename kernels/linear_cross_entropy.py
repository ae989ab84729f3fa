"""Linear layer and cross-entropy in one, a chunk of rows at a time.

The logits [N, V] are never held: each chunk's gradient is made while its logits are at hand, as in
Liger-Kernel (Hsu et al., arXiv:2410.10989). This is the portable path of torch operations.
"""

from typing import Any, Literal

import torch

CHUNK_ROWS = 256
"""Rows at a time; on a CPU fewer starve the matrix products and more only cost memory."""


def fused_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    logit_softcap: float = 0.0,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against ``targets``.

    hidden [N, D] and weight [V, D] are floating, targets [N] is int64 with rows of
    ``ignore_index`` left out. Returns the loss in float32: a scalar, or [N] for ``"none"`` (0 where
    ignored). A mean over no valid target is NaN, as torch's own is. ``logit_softcap`` c > 0
    replaces a logit z by c tanh(z / c). Under autocast the products are in its dtype. Raises
    `ValueError` on shapes or values that do not fit.
    """
    _check(hidden, weight, targets, ignore_index, reduction, chunk_rows)
    if reduction == "none":
        losses: torch.Tensor = _PerRow.apply(
            hidden, weight, targets, ignore_index, logit_softcap, chunk_rows
        )
        return losses
    total: torch.Tensor = _Summed.apply(
        hidden, weight, targets, ignore_index, logit_softcap, chunk_rows
    )
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


class _Summed(torch.autograd.Function):
    """The summed loss; its gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        softcap: float,
        chunk_rows: int,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        losses, *gradients = _chunked(
            hidden, weight, targets, ignore_index, softcap, chunk_rows, needs_hidden, needs_weight
        )
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:  # type: ignore[override]
        gradients = (None if g is None else g * outer[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, None, None, None, None)


class _PerRow(torch.autograd.Function):
    """The loss of each row; backward makes the logits again, knowing the rows' weights."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        softcap: float,
        chunk_rows: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rest = (ignore_index, softcap, chunk_rows)
        return _chunked(hidden, weight, targets, ignore_index, softcap, chunk_rows, False, False)[0]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> Any:  # type: ignore[override]
        hidden, weight, targets = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ignore_index, softcap, chunk_rows = ctx.rest
        gradients = _chunked(
            hidden,
            weight,
            targets,
            ignore_index,
            softcap,
            chunk_rows,
            needs_hidden,
            needs_weight,
            outer[0],
        )[1:]
        return (*gradients, None, None, None, None)


@torch.no_grad()
def _chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    softcap: float,
    chunk_rows: int,
    needs_hidden: bool,
    needs_weight: bool,
    row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Losses float32 [N], and the gradients of their (weighted) sum that are asked for."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        table = weight.to(dtype)
        losses = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for first in range(0, len(hidden), chunk_rows):
            rows = slice(first, first + chunk_rows)
            part, wanted = hidden[rows].to(dtype), targets[rows]
            valid = wanted != ignore_index
            index = wanted.where(valid, 0)[:, None]
            logits = (part @ table.T).float()
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            log_sum = logits.logsumexp(dim=1)
            losses[rows] = (log_sum - logits.gather(1, index)[:, 0]).where(valid, 0.0)
            if d_hidden is None and d_weight is None:
                continue
            slope = 1 - (logits / softcap).square() if softcap else None
            gradient = logits.sub_(log_sum[:, None]).exp_()
            gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
            scale = valid.float() if row_weights is None else row_weights[rows] * valid
            gradient *= scale[:, None]
            if slope is not None:
                gradient *= slope
            small = gradient.to(dtype)
            if d_hidden is not None:
                d_hidden[rows] = small @ table
            if d_weight is not None:
                d_weight += small.T @ part
    return losses, d_hidden, None if d_weight is None else d_weight.to(weight.dtype)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
    chunk_rows: int,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "expected [N, D] and [V, D]"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets {tuple(targets.shape)} {targets.dtype}: expected int64 [{len(hidden)}]"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r}: expected 'mean', 'sum' or 'none'")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows {chunk_rows}: expected at least 1")
    if targets.device.type == "cpu":
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= len(weight)))
        if outside.any():
            bad = int(targets[outside][0])
            raise ValueError(f"targets hold {bad}: expected 0 to {len(weight) - 1}")
