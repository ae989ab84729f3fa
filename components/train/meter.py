"""Speed figures: tokens per second, share of the hardware's peak, waiting, memory, time left."""

import resource
import time
from typing import Any

import torch

from nudge.components.common.models.language_model import head_weight
from nudge.components.train.models.quantized import QuantizedLinear

BF16_PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "AMD Instinct MI300X": 1307e12,
}
"""Dense bf16 matrix FLOP/s by device-name prefix, from the manufacturers' data sheets."""
WINDOW_STEPS = 20
"""Number of recent steps over which the displayed speed is averaged."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, or None if it is not in the table; the longest prefix wins."""
    known = [name for name in BF16_PEAKS if device_name.startswith(name)]
    return BF16_PEAKS[max(known, key=len)] if known else None


def flops_per_token(model: Any, length: int) -> float:
    """FLOPs to train on one token: 6 N + 12 L H Q T (PaLM, arXiv:2204.02311, appendix B).

    N counts the weights of matrix products, so it excludes an untied input embedding. A frozen
    weight, as in LoRA, has no gradient and counts 4 instead of 6.
    """
    config = model.config
    lookup = model.get_input_embeddings().weight
    if lookup is head_weight(model):
        lookup = None
    used = [p for p in model.parameters() if p is not lookup]
    trained = sum(p.numel() for p in used if p.requires_grad)
    frozen = sum(p.numel() for p in used if not p.requires_grad)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            stored = module.codes.numel() + module.scales.numel()
            frozen += module.weight_shape.numel() - stored
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6 * trained + 4 * frozen + 12 * config.num_hidden_layers * heads * head_size * length


def model_flops_utilization(
    tokens_per_s: float, flops_a_token: float, peak: float | None, devices: int
) -> float | None:
    """MFU, 0 to 1: the FLOP/s that the model needs over the peak FLOP/s of the devices."""
    return tokens_per_s * flops_a_token / (peak * devices) if peak else None


class Meter:
    """Measures speed over the last `WINDOW_STEPS` steps."""

    def __init__(self, model: Any, length: int, bfloat16: bool, device: Any, world: int) -> None:
        self._flops, self._device, self._world = flops_per_token(model, length), device, world
        cuda = device.type == "cuda" and bfloat16
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if cuda else None
        self._marks: list[tuple[float, int, float]] = [(time.monotonic(), 0, 0.0)]

    def step(self, tokens: int, waited: float, steps_left: int) -> dict[str, float | None]:
        """The figures after a step on ``tokens`` tokens that waited ``waited`` s for data."""
        _, all_tokens, all_waited = self._marks[-1]
        self._marks.append((time.monotonic(), all_tokens + tokens, all_waited + waited))
        self._marks = self._marks[-WINDOW_STEPS - 1 :]
        (began, tokens_before, waited_before), now = self._marks[0], self._marks[-1]
        seconds = now[0] - began
        speed = (now[1] - tokens_before) / seconds
        return {
            "tokens_per_s": speed,
            "mfu": model_flops_utilization(speed, self._flops, self._peak, self._world),
            "data_wait_share": (now[2] - waited_before) / seconds,
            "memory_bytes": memory_bytes(self._device),
            "eta_s": seconds / (len(self._marks) - 1) * steps_left,
        }


def memory_bytes(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
