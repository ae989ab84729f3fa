"""What a quantized base model costs before it is trained, in bits per byte of held-out text."""

import functools
import math
from typing import Any

from nudge.components.train.data import IGNORED, PackedSplit
from nudge.components.train.loop import validation_loss
from nudge.components.train.models.model import Start
from nudge.components.train.models.network import Network
from nudge.components.train.models.quantized import QuantizedLinear
from nudge.components.train.settings import TrainSettings


def bits_per_byte_of_a_nat(
    validation: PackedSplit, tokenizer: Any, settings: TrainSettings
) -> float:
    """The bits per byte of a loss of one nat per token, over the validation rows of the settings.

    The bytes are those of the rows' tokens as text.
    """
    rows = validation.batch(0, 0, min(settings.validation_sequences, validation.rows))
    targets = [row[row != IGNORED].tolist() for row in rows.targets]
    text_bytes = sum(len(tokenizer.decode(row).encode()) for row in targets)
    return sum(len(row) for row in targets) / math.log(2) / text_bytes


def quantization_cost(
    network: Network,
    start: Start,
    validation: PackedSplit,
    tokenizer: Any,
    settings: TrainSettings,
) -> dict[str, float]:
    """``base_bits_per_byte`` and ``quantized_bits_per_byte`` over the validation rows of the
    settings; empty if nothing is quantized.

    The original weights are read from the base model's files, one layer at a time. Every rank must
    call this.
    """
    layers = {
        name.removesuffix(".base_layer"): module
        for name, module in network.model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    if not layers:
        return {}
    bits_per_byte = bits_per_byte_of_a_nat(validation, tokenizer, settings)
    after = validation_loss(network, validation, settings)
    try:
        for name, layer in layers.items():
            layer.original = functools.partial(
                start.base_tensor, f"{name}.weight", layer.weight_shape, network.model
            )
        before = validation_loss(network, validation, settings)
    finally:
        for layer in layers.values():
            layer.original = None
    return {
        "base_bits_per_byte": before * bits_per_byte,
        "quantized_bits_per_byte": after * bits_per_byte,
    }
