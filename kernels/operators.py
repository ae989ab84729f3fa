"""Custom operators that present `chunked` to autograd, fake tensors and torch.compile.

`linear_cross_entropy` returns the weighted sum of losses and computes its gradients in forward;
backward only scales them. `linear_cross_entropy_rows` returns the loss of each row; its backward
recomputes the logits through `linear_cross_entropy_grad`, because only then are the rows' weights
known.
"""

from typing import Any

import torch
from torch import Tensor

from nudge.kernels import native
from nudge.kernels.arguments import Inputs, Options, Result, Wanted
from nudge.kernels.chunked import chunked, result_dtype

TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? class_weight"
REST = (
    "int ignore_index, float smoothing, float z_loss, float softcap, ScalarType? accum, "
    "ScalarType? compute, int? chunk_rows, int? valid_rows, bool[] wants"
)
"""The fields of `Options` in order, then those of `Wanted`."""
GRADIENTS = "Tensor d_hidden, Tensor d_weight, Tensor d_bias"
"""Empty where not wanted."""


def _split(rest: tuple[Any, ...]) -> tuple[Options, Wanted]:
    return Options(*rest[:-1]), Wanted(*rest[-1])


def check_targets(
    targets: Tensor, ignore_index: int, vocabulary: int, valid_rows: int | None = None
) -> None:
    """Raise `ValueError` for a target out of range or a wrong number of valid ones, on a CPU; a GPU
    would have to synchronize."""
    if targets.device.type == "cpu":
        is_valid = targets != ignore_index
        if valid_rows is not None and valid_rows != (valid := int(is_valid.sum())):
            raise ValueError(f"valid_rows {valid_rows}: expected {valid}, the rows with a target")
        outside = is_valid & ((targets < 0) | (targets >= vocabulary))
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"targets hold {int(targets[row])}: expected 0 to {vocabulary - 1} or "
                f"ignore_index {ignore_index} (row {row})"
            )


def weighted_sum(done: Result) -> Tensor:
    """The loss. A mean over nothing is 0 * inf = NaN, as in torch."""
    return (done.losses.sum(dtype=torch.float64) * done.row_scale).to(done.losses.dtype)


def _gradients(
    computed: tuple[Tensor | None, ...], likes: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[Tensor, ...]:
    hidden = likes[0]
    return tuple(
        hidden.new_empty(0) if value is None or like is None else value.to(like.dtype)
        for value, like in zip(computed, likes, strict=True)
    )


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(
        like.new_empty(like.shape) if wanted and like is not None else hidden.new_empty(0)
        for like, wanted in zip((hidden, weight, bias), wants, strict=True)
    )


@torch.library.custom_op("nudge::scale_unless_one_", mutates_args=("value",))
def scale_unless_one_(value: Tensor, factor: Tensor) -> None:
    """value *= factor; does not touch value if the factor is 1. No synchronization on CUDA."""
    if native.usable(value):
        native.scale_unless_one(value, factor.float())
    elif value.is_cuda or factor.item() != 1:
        value.mul_(factor.to(value.dtype))


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    mean: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    options, wanted = _split(rest)
    check_targets(targets, options.ignore_index, len(weight), options.valid_rows)
    inputs = Inputs(hidden, weight, bias, targets, class_weight)
    done = chunked(inputs, None, options, wanted, mean=mean)
    gradients = _gradients((done.hidden, done.weight, done.bias), (hidden, weight, bias))
    return weighted_sum(done), done.lse, *gradients


linear_cross_entropy = torch.library.custom_op(
    "nudge::linear_cross_entropy",
    _linear_cross_entropy,
    mutates_args=(),
    schema=f"({TENSORS}, bool mean, {REST}) -> (Tensor loss, Tensor lse, {GRADIENTS})",
)


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    exact = result_dtype(hidden)
    loss, lse = hidden.new_empty((), dtype=exact), hidden.new_empty(hidden.shape[0], dtype=exact)
    return loss, lse, *_fake_gradients(hidden, weight, bias, rest[-1])


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.wants = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _refuse_second_derivatives(saved: tuple[Tensor, ...]) -> None:
    """With create_graph, the gradients would look differentiable but would not be."""
    if torch.is_grad_enabled() and all(type(value) is Tensor for value in saved):
        raise RuntimeError(
            "fused_linear_cross_entropy has no second derivatives: call backward without "
            "create_graph=True, or use torch.nn.functional.cross_entropy for this loss"
        )


def _scale_gradients(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
    """Scale the saved gradients in place.

    Not in place if the graph is kept, because another backward needs them unscaled, or while it is
    traced.
    """
    factor = outer[0]
    gradients: list[Tensor | None] = [None, None, None]
    if factor is not None:
        _refuse_second_derivatives(ctx.saved_tensors)
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        for at, (saved, wanted) in enumerate(zip(ctx.saved_tensors, ctx.wants, strict=True)):
            if wanted and (kept or type(saved) is not Tensor):
                gradients[at] = saved * factor.to(saved.dtype)
            elif wanted:
                scale_unless_one_(saved, factor)
                gradients[at] = saved
    d_hidden, d_weight, d_bias = gradients
    return d_hidden, d_weight, d_bias, *([None] * 12)


linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _linear_cross_entropy_grad(
    row_scale: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    inputs = Inputs(hidden, weight, bias, targets, class_weight)
    done = chunked(inputs, row_scale, *_split(rest))
    return _gradients((done.hidden, done.weight, done.bias), (hidden, weight, bias))


linear_cross_entropy_grad = torch.library.custom_op(
    "nudge::linear_cross_entropy_grad",
    _linear_cross_entropy_grad,
    mutates_args=(),
    schema=f"(Tensor row_scale, {TENSORS}, {REST}) -> ({GRADIENTS})",
)


@linear_cross_entropy_grad.register_fake
def _(
    row_scale: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, weight, bias, rest[-1])


def _linear_cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    options, _ = _split(rest)
    check_targets(targets, options.ignore_index, len(weight), options.valid_rows)
    inputs = Inputs(hidden, weight, bias, targets, class_weight)
    done = chunked(inputs, None, options, Wanted(False, False, False))
    return done.losses, done.lse


linear_cross_entropy_rows = torch.library.custom_op(
    "nudge::linear_cross_entropy_rows",
    _linear_cross_entropy_rows,
    mutates_args=(),
    schema=f"({TENSORS}, {REST}) -> (Tensor losses, Tensor lse)",
)


@linear_cross_entropy_rows.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=result_dtype(hidden))
    return losses, torch.empty_like(losses)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _recompute(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
    row_scale = outer[0]
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if row_scale is not None:
        _refuse_second_derivatives((row_scale.detach(),))
        computed = linear_cross_entropy_grad(row_scale, *ctx.saved_tensors, *ctx.rest)
        gradients = tuple(g if w else None for g, w in zip(computed, ctx.rest[-1], strict=True))
    return *gradients, *([None] * 11)


linear_cross_entropy_rows.register_autograd(_recompute, setup_context=_keep_inputs)
