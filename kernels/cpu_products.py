"""float32 matrix products on a CPU, by oneDNN if MKL would leave half of the vector unit idle.

torch for x86 multiplies float32 matrices with MKL, which is no faster than AVX2 on CPUs that are
not Intel's. The oneDNN in the same torch uses AVX-512 on every CPU that has it: on a Zen 5 its
products take half the time (kernels/NOTES.md). It sums in another order, so the last digits differ.
The choice depends only on the machine, so that a run repeats bit for bit.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this torch has both libraries, and this CPU has AVX-512 that MKL does not use."""
    name = str(torch.cpu.get_capabilities().get("cpu_name", "Intel"))
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"  # respects ATEN_CPU_CAPABILITY
        and "Intel" not in name
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        # Inductor calls it for compiled linear layers; torch has it since 2.0.
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def takes(*values: Tensor) -> bool:
    """Whether `product` supports these matrices and is faster: float32, not empty, on the CPU."""
    return (
        all(
            value.device.type == "cpu" and value.dtype == torch.float32 and value.numel() > 0
            for value in values
        )
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [m, k] @ right [k, n] + bias [n]. `takes` must be true; autograd does not see it."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, bias, "none", [], "")
    return result


def mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out [m, n] = left [m, k] @ right [k, n], on any device. Autograd does not see it."""
    if takes(left, right):
        out.copy_(product(left, right))
    else:
        torch.mm(left, right, out=out)


class _Linear(torch.autograd.Function):
    """The autograd node of a product that `linear` computes afterwards.

    A custom function saves its tensors after it runs; torch's own products save theirs before. A
    checkpoint's recomputation stops once all tensors are saved, so a function that computed the
    product itself would compute one in vain.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = product(rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = product(rows.T, x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0)
        return d_x, d_weight, d_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, by oneDNN if that is faster: x [..., D], weight [V, D]."""
    if torch.is_autocast_enabled(x.device.type) or not takes(x, weight) or x.dim() < 2:
        return torch.nn.functional.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        result.data = product(x.flatten(0, -2), weight.T, bias).view(result.shape)
    return result
