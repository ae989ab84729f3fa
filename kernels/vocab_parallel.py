"""The vocabulary-parallel loss: each rank has a slice of the vocabulary's weight."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nudge.kernels.arguments import Inputs, Options, Wanted
from nudge.kernels.chunked import chunked
from nudge.kernels.linear_cross_entropy import check_input
from nudge.kernels.operators import weighted_sum


class _Ranks:
    """`Combine` over a process group: two reductions per chunk, and one of hidden's gradient."""

    def __init__(self, group: dist.ProcessGroup | None, first: int, vocabulary: int) -> None:
        self.group, self.first, self.vocabulary = group, first, vocabulary

    def max(self, value: Tensor) -> None:
        dist.all_reduce(value, dist.ReduceOp.MAX, self.group)

    def sum(self, value: Tensor) -> None:
        dist.all_reduce(value, dist.ReduceOp.SUM, self.group)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        mean: bool,
        ranks: _Ranks,
        options: Options,
    ) -> Tensor:
        # All ranks must make the same collective calls, so hidden's gradient is always computed.
        wanted = Wanted(True, ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        inputs = Inputs(hidden, weight, bias, targets, None)
        done = chunked(inputs, None, options, wanted, ranks, mean)
        ctx.save_for_backward(done.hidden, done.weight, done.bias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return weighted_sum(done)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Any:  # type: ignore[override]
        scaled = [None if g is None else g * outer[0].to(g.dtype) for g in ctx.saved_tensors]
        if scaled[2] is not None:
            scaled[2] = scaled[2].to(ctx.bias_dtype)
        return (*scaled, None, None, None, None)


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first_index: int,
    vocabulary: int,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float = 0.0,
    accum_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """The loss if this rank of ``group`` has the vocabulary's rows from ``first_index`` on.

    hidden [N, D] and targets [N] (indices in the full vocabulary, 0 to ``vocabulary`` - 1) are the
    same on all ranks; weight [V_rank, D] and bias [V_rank] are this rank's slice. The loss and
    hidden's gradient are complete and the same on all ranks; the gradients of weight and bias cover
    the slice. A row's maximum, sum of exponentials and target logit are reduced across ranks, as in
    Megatron-LM (Shoeybi et al., arXiv:1909.08053). Raises `ValueError` as
    `fused_linear_cross_entropy` does, on every rank.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}: expected 'mean' or 'sum'")
    if not 0 <= first_index <= vocabulary - len(weight):
        raise ValueError(
            f"first_index {first_index}: with weight {tuple(weight.shape)} expected 0 to "
            f"{vocabulary - len(weight)} (vocabulary {vocabulary})"
        )
    options = Options(
        ignore_index, label_smoothing, z_loss, logit_softcap, accum_dtype, None, chunk_rows
    )
    check_input(hidden, weight, targets, bias, None, reduction, options, vocabulary)
    ranks = _Ranks(group, first_index, vocabulary)
    loss: Tensor = _VocabParallel.apply(
        hidden, weight, bias, targets, reduction == "mean", ranks, options
    )
    return loss
