"""Linear layer and cross-entropy in one, chunk by chunk: the public function and module.

The layers, from the outside in: this file checks the arguments, `operators` defines what autograd
and torch.compile see, `chunked` and `softmax_loss` compute, and `native` loads the CUDA kernel.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from nudge.kernels.arguments import Options
from nudge.kernels.operators import (
    check_targets,
    linear_cross_entropy,
    linear_cross_entropy_rows,
)

Reduction = Literal["mean", "sum", "none"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@overload
def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    logit_softcap: float = ...,
    class_weight: Tensor | None = ...,
    accum_dtype: torch.dtype | None = ...,
    chunk_rows: int | None = ...,
    valid_rows: int | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: Reduction = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    logit_softcap: float = ...,
    class_weight: Tensor | None = ...,
    accum_dtype: torch.dtype | None = ...,
    chunk_rows: int | None = ...,
    valid_rows: int | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float = 0.0,
    class_weight: Tensor | None = None,
    accum_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    valid_rows: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``targets``, without the logits [N, V].

    hidden [N, D], weight [V, D] and bias [V] have one floating dtype (under autocast any, and the
    products use autocast's). targets [N] is int64; rows with target ``ignore_index`` are excluded.
    Returns the loss in float32 (float64 for float64): a scalar, or [N] for ``"none"``, 0 for
    ignored rows. ``return_lse`` adds the logsumexp [N] of each row's logits, 0 for ignored rows;
    it has no gradient.

    label_smoothing and class_weight [V] work as in `torch.nn.functional.cross_entropy`. z_loss adds
    z_loss * logsumexp^2 to a row's loss (PaLM, arXiv:2204.02311); class weights do not apply to it,
    and its mean is over the valid targets, as in Liger-Kernel. logit_softcap c > 0 replaces a logit
    z by c tanh(z / c) (Gemma 2, arXiv:2408.00118). accum_dtype is the dtype in which the weight's
    gradient is summed over chunks: by default the weight's, but float32 for 16-bit weights and more
    than 4 chunks. chunk_rows is the number of rows per chunk.

    Ignored rows cost nothing on a CPU. On a GPU, counting them would synchronize, so they cost as
    much as the others unless the caller says in valid_rows how many rows have a target. A wrong
    number raises on a CPU and makes the loss NaN on a GPU.

    A mean over no valid target, or over targets whose class weights sum to 0, is NaN with zero
    gradients; a sum is 0. A target outside [0, V) raises on a CPU; on CUDA, where checking would
    synchronize, its row's loss and gradient are NaN. Forward computes the gradients; with
    ``"none"``, backward recomputes the logits. Backward may run more than once under
    ``retain_graph``; second derivatives are not supported.

    Raises `ValueError` with the argument and its value if shapes, dtypes, devices or values do not
    fit, including N = 0 and V = 1.
    """
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    # torch 2.11 cannot trace torch.amp.is_autocast_available.
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    compute = torch.get_autocast_dtype(device) if autocast else None
    if isinstance(hidden, Tensor) and hidden.dtype == torch.float64:
        compute = None  # autocast itself does not cast float64 either
    options = Options(
        ignore_index, label_smoothing, z_loss, logit_softcap, accum_dtype, compute, chunk_rows,
        valid_rows,
    )  # fmt: skip
    check_input(hidden, weight, targets, bias, class_weight, reduction, options)
    grad = torch.is_grad_enabled()
    wants = [
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    ]
    # class_weight gets no gradient.
    constant = None if class_weight is None else class_weight.detach()
    rest = (
        ignore_index, label_smoothing, z_loss, logit_softcap, accum_dtype, compute, chunk_rows,
        valid_rows, wants,
    )  # fmt: skip
    if reduction == "none":
        loss, lse = linear_cross_entropy_rows(hidden, weight, bias, targets, constant, *rest)
    else:
        mean = reduction == "mean"
        loss, lse = linear_cross_entropy(hidden, weight, bias, targets, constant, mean, *rest)[:2]
    return (loss, lse) if return_lse else loss


class FusedLinearCrossEntropy(nn.Module):
    """The head and its loss as a module that owns weight [V, D] and bias [V].

    Because it owns them, `fully_shard` can gather the weight around `forward`. Tie the weight to an
    embedding by assignment: ``head.weight = embedding.weight``. ``options`` are the keyword
    arguments of `fused_linear_cross_entropy` except bias.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        head = nn.Linear(hidden_size, vocabulary, bias=bias, device=device, dtype=dtype)
        self.weight, self.bias = head.weight, head.bias
        self.options = options

    def forward(self, hidden: Tensor, targets: Tensor) -> Any:
        """The loss of hidden [N, D] against targets [N]; see `fused_linear_cross_entropy`."""
        return fused_linear_cross_entropy(
            hidden, self.weight, targets, bias=self.bias, **self.options
        )

    def extra_repr(self) -> str:
        vocabulary, size = self.weight.shape
        return f"{size}, {vocabulary}, bias={self.bias is not None}, {self.options}"


def check_input(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    options: Options,
    vocabulary: int | None = None,
) -> None:
    """Raise `ValueError` with the first bad argument and its value; never synchronizes."""
    for name, argument in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if not isinstance(argument, Tensor):
            raise ValueError(f"{name} is a {type(argument).__name__}: expected a tensor")
    if type(weight).__name__ == "DTensor":
        raise ValueError(
            "weight is a sharded DTensor: use FusedLinearCrossEntropy under fully_shard, which "
            "gathers it, or vocab_parallel_linear_cross_entropy on weight.to_local()"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "expected [N, D] and [V, D]"
        )
    if hidden.shape[0] < 1 or hidden.shape[1] < 1:
        raise ValueError(f"hidden {tuple(hidden.shape)}: expected [N, D] with N and D at least 1")
    if (vocabulary or weight.shape[0]) < 2:
        raise ValueError(f"weight {tuple(weight.shape)}: expected [V, D] with V at least 2")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets {tuple(targets.shape)} {targets.dtype}: expected int64 [{hidden.shape[0]}]"
        )
    for name, value in (("bias", bias), ("class_weight", class_weight)):
        if value is not None and value.shape != weight.shape[:1]:
            raise ValueError(f"{name} {tuple(value.shape)}: expected [{weight.shape[0]}]")
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.dtype not in DTYPES:
            raise ValueError(f"{name} is {value.dtype}: expected one of {DTYPES}")
        if options.compute_dtype is None and value.dtype != weight.dtype:
            raise ValueError(f"{name} is {value.dtype}: expected weight's {weight.dtype}")
    if class_weight is not None and not class_weight.is_floating_point():
        raise ValueError(f"class_weight is {class_weight.dtype}: expected a floating dtype")
    for name, value in (
        ("weight", weight), ("targets", targets), ("bias", bias), ("class_weight", class_weight),
    ):  # fmt: skip
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}: expected hidden's {hidden.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r}: expected 'mean', 'sum' or 'none'")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing {options.label_smoothing}: expected 0 to 1")
    if not 0 <= options.z_loss < math.inf:
        raise ValueError(f"z_loss {options.z_loss}: expected 0 or more, and finite")
    if not 0 <= options.logit_softcap < math.inf:
        raise ValueError(f"logit_softcap {options.logit_softcap}: expected 0 or more, and finite")
    if options.chunk_rows is not None and options.chunk_rows < 1:
        raise ValueError(f"chunk_rows {options.chunk_rows}: expected at least 1")
    if options.valid_rows is not None and not 0 <= options.valid_rows <= len(targets):
        raise ValueError(f"valid_rows {options.valid_rows}: expected 0 to {len(targets)}")
    if options.accum_dtype is not None and options.accum_dtype not in DTYPES:
        raise ValueError(f"accum_dtype {options.accum_dtype}: expected one of {DTYPES}")
    if vocabulary is not None:
        check_targets(targets, options.ignore_index, vocabulary)
