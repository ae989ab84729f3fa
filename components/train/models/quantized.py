"""Frozen linear layers in 8 or 4 bits, beside which LoRA trains (QLoRA: Dettmers et al.,
arXiv:2305.14314).

A layer keeps its weight as codes and scales, both with a row per output, so that FSDP shards them
like any other parameter. It dequantizes for each product, in forward and backward, so the full
weight exists for one layer at a time. bitsandbytes has the kernels, for CPUs and GPUs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nudge.components.common.core.errors import UserError

BLOCK = 64
"""NF4 weights that share a scale, as in the paper."""


class QuantizedLinear(nn.Module):
    """A linear layer [out, in] whose frozen weight is ``codes`` and ``scales``.

    ``int8`` has one code per weight and a scale per row (absolute maximum / 127); ``nf4`` has two
    codes per byte and a float32 scale per `BLOCK` weights.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = kind
        device = linear.weight.device
        if kind == "nf4":
            width, blocks, dtype = self.in_features // 2, self.in_features // BLOCK, torch.uint8
        else:
            width, blocks, dtype = self.in_features, 1, torch.int8
        codes = torch.empty(self.out_features, width, dtype=dtype, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        scales = torch.empty(self.out_features, blocks, dtype=torch.float32, device=device)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = linear.bias
        self.original: Callable[[], torch.Tensor] | None = None
        """Returns the weight before it was quantized, to measure what that costs."""

    @property
    def weight_shape(self) -> torch.Size:
        """The shape of the weight that is quantized: [out, in]."""
        return torch.Size((self.out_features, self.in_features))

    def from_rows(self, attribute: str, weight: torch.Tensor) -> torch.Tensor:
        """The rows of ``codes`` or ``scales`` for rows of the weight, float32 [rows, in]."""
        codes, scales = quantized(weight, self.kind)
        return codes if attribute == "codes" else scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if self.original is not None:
            weight = self.original().to(x.device, dtype)
            return nn.functional.linear(x.to(dtype), weight, self.bias)
        product: torch.Tensor = _Product.apply(x.to(dtype), self.codes, self.scales, self.kind)
        return product if self.bias is None else product + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T that keeps the codes for the backward pass instead of W."""

    @staticmethod
    def forward(ctx: Any, x: Any, codes: Any, scales: Any, kind: str) -> Any:
        ctx.save_for_backward(codes, scales)
        ctx.kind, ctx.dtype = kind, x.dtype
        return x @ dequantized(codes, scales, kind).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        codes, scales = ctx.saved_tensors
        weight = dequantized(codes, scales, ctx.kind).to(ctx.dtype)
        return gradient.to(ctx.dtype) @ weight, None, None, None


def quantized(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows of a weight, float32 [rows, in]."""
    if kind == "int8":
        scales = weight.abs().amax(1, keepdim=True) / 127
        codes = torch.round(weight / scales.clamp(min=torch.finfo(torch.float32).tiny))
        return codes.to(torch.int8), scales
    from bitsandbytes.functional import quantize_4bit

    rows, width = weight.shape
    if rows == 0:
        return torch.empty(0, width // 2, dtype=torch.uint8), torch.empty(0, width // BLOCK)
    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed.view(rows, width // 2), state.absmax.view(rows, width // BLOCK)


def dequantized(codes: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """The weight, float32 [rows, in], of codes and scales."""
    if kind == "int8":
        return codes.float() * scales
    rows, width = codes.shape[0], 2 * codes.shape[1]
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), scales.reshape(-1), BLOCK, "nf4", [rows, width], torch.float32
    )
    return weight


def quantize_layers(model: Any, kind: str) -> None:
    """Replace the linear layers of the model's blocks, on the meta device, by quantized ones.

    Embeddings, norms, head and adapters stay. Raises `UserError` if bitsandbytes is not installed,
    or if the model has no such layers.
    """
    if kind == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise UserError(
                "train.base_dtype = nf4 needs the Python package bitsandbytes, which is not "
                "installed; install it: pip install 'nudge-lm[train]'"
            ) from None
    kinds = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    found = 0
    for block in blocks:
        for path, module in list(block.named_modules()):
            if type(module) is not nn.Linear or "lora_" in path:
                continue
            if kind == "nf4" and module.in_features % BLOCK:
                continue
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, QuantizedLinear(module, kind))
            found += 1
    if not found:
        raise UserError(
            f"train.base_dtype = {kind}: {type(model).__name__} has no linear layers that can be "
            "quantized; use float32 or bfloat16"
        )


def parameter_count(model: nn.Module) -> int:
    """The parameters of a model without adapters; a quantized weight counts as its original."""
    count = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "lora_" not in name and not name.endswith((".codes", ".scales"))
    )
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return count + sum(layer.weight_shape.numel() for layer in layers)
