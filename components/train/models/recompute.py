"""Layers that keep less for the backward pass and give the same bits.

The recomputation needs no matrix product: torch's checkpoints stop early, as soon as they have
recomputed every tensor that the layer would have kept.
"""

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nudge.components.common.core.errors import UserError
from nudge.components.train.settings import TrainSettings


def recompute_layers(model: Any, layers: list[nn.Module], settings: TrainSettings) -> None:
    """Let the layers that the setting `activation_checkpointing` counts keep only their inputs.

    The first layers are recomputed; the others keep what `keep_less` leaves. Raises `UserError` if
    the model can only recompute all of them.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    count = settings.activation_checkpointing
    if isinstance(count, bool) or count >= len(layers):
        return
    for layer in layers[count:]:
        if not hasattr(layer, "gradient_checkpointing"):
            raise UserError(
                f"train.activation_checkpointing = {count}: {type(model).__name__} recomputes "
                "all layers or none; set it to true or false"
            )
        layer.gradient_checkpointing = False  # type: ignore[assignment]
        if not settings.compile:
            keep_less(layer)


def keep_less(model: nn.Module) -> None:
    """Let gated MLPs and RMSNorms keep their inputs instead of their intermediate results.

    A gated MLP is down(act(gate(x)) * up(x)). It keeps two of four tensors of its inner size. An
    MLP that computes anything else, or whose weights an adapter wraps, stays unchanged.
    """
    for module in model.modules():
        if _is_gated_mlp(module):
            module.forward = types.MethodType(_gated_mlp, module)
        elif type(module).__name__.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
            module.forward = types.MethodType(_recomputed, module)


def _is_gated_mlp(module: Any) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(type(part) is not nn.Linear for part in parts) or not hasattr(module, "act_fn"):
        return False
    return _computes_gated_mlp(module)


def _computes_gated_mlp(module: Any) -> bool:
    """Whether its ``forward`` is that of a gated MLP, tried on a small copy: the weights may still
    be on the meta device or sharded."""
    small = copy.copy(module)
    small._modules = dict(module._modules)
    generator = torch.Generator().manual_seed(0)
    for name, (inner, outer) in {
        "gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4),
    }.items():  # fmt: skip
        linear = nn.Linear(inner, outer, bias=getattr(module, name).bias is not None, device="meta")
        linear.to_empty(device="cpu")
        for parameter in linear.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 8)
        small._modules[name] = linear
    probe = torch.linspace(-2, 2, 12).view(3, 4)
    try:
        with torch.no_grad():
            return torch.equal(small(probe), _gated_mlp(small, probe))
    except RuntimeError:  # it reshapes to its own sizes
        return False


def _gated_mlp(self: Any, x: torch.Tensor) -> Any:
    def last(gate: torch.Tensor, up: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(gate) * up)

    return _checkpointed(last, self.gate_proj(x), self.up_proj(x))


def _recomputed(self: Any, *inputs: Any) -> Any:
    return _checkpointed(types.MethodType(type(self).forward, self), *inputs)


def _checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
