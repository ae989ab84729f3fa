"""Layers that keep less for the backward pass and give the same bits.

The recomputation needs no matrix product: torch's checkpoints stop early, as soon as they have
recomputed every tensor that the layer would have kept.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


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
    weight = module.gate_proj.weight
    probe = torch.linspace(-2, 2, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        return torch.equal(module(probe.view(3, -1)), _gated_mlp(module, probe.view(3, -1)))


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
