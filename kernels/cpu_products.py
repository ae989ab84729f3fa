"""Matrix products in float32 on a CPU, by oneDNN where MKL leaves half of the vector unit idle.

A torch for x86 multiplies float32 matrices with MKL, which on CPUs that Intel did not make goes no
faster than AVX2 can. The oneDNN in the same torch uses AVX-512 wherever the CPU has it: on a Zen 5
its products take half the time (kernels/NOTES.md). Sums are taken in another order, so digits
differ in the last places; the choice depends on the machine alone, so that a run repeats itself bit
for bit.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this torch has both libraries and this CPU an AVX-512 that MKL does not use."""
    name = str(torch.cpu.get_capabilities().get("cpu_name", "Intel"))
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"  # what ATEN_CPU_CAPABILITY leaves
        and "Intel" not in name
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        # Inductor calls it for the linear layers that it compiles; in torch since 2.0.
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def takes(*values: Tensor) -> bool:
    """Whether `product` is the faster way for these: plain matrices of float32 on the CPU."""
    return (
        all(
            value.device.type == "cpu" and value.dtype == torch.float32 and value.numel() > 0
            for value in values
        )
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
    )


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [m, k] @ right [k, n] + bias [n]; `takes` must hold. Autograd does not see it."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, bias, "none", [], "")
    return made


def mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out [m, n] = left [m, k] @ right [k, n], on any device; autograd does not see it."""
    if takes(left, right):
        out.copy_(product(left, right))
    else:
        torch.mm(left, right, out=out)


class _Linear(torch.autograd.Function):
    """The node in the graph of a product that `linear` then makes.

    What a function saves is saved after it ran, and what torch's own products save before: a
    checkpoint stops when all is saved again, and would here have made a product for nothing.
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
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = product(rows, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = product(rows.T, x.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, by oneDNN where that is faster: x [..., D], weight [V, D]."""
    if torch.is_autocast_enabled(x.device.type) or not takes(x, weight) or x.dim() < 2:
        return torch.nn.functional.linear(x, weight, bias)
    made: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        made.data = product(x.flatten(0, -2), weight.T, bias).view(made.shape)
    return made
