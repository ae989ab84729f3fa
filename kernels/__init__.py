"""Fused loss of a language model's head: linear layer and cross-entropy, without the logits."""

from nudge.kernels.linear_cross_entropy import fused_linear_cross_entropy

__all__ = ["fused_linear_cross_entropy"]
