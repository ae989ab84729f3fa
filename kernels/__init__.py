"""The fused loss of a language model's head: linear layer and cross-entropy without the logits."""

from nudge.kernels.linear_cross_entropy import FusedLinearCrossEntropy, fused_linear_cross_entropy
from nudge.kernels.vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = [
    "FusedLinearCrossEntropy",
    "fused_linear_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
