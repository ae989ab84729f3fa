"""Quantize the model that training wrote, and measure what that costs on held-out text."""

from pathlib import Path
from typing import Any

import torch

from nudge.components.common.artifacts.model import ServedWeights
from nudge.components.common.models.language_model import hidden_states, next_token_loss
from nudge.components.common.models.loading import meta_model, model_config
from nudge.components.common.models.serving_quantization import load_quantized, quantize_folder
from nudge.components.train.data import IGNORED, PackedSplit
from nudge.components.train.settings import TrainSettings

ROOM = 1.5
"""Free memory that a GPU needs for the measurement, as a multiple of the weights in float32."""


def quantize_for_serving(
    folder: Path,
    loss_before: float,
    bits_per_byte: float,
    validation: PackedSplit,
    settings: TrainSettings,
    device: torch.device,
) -> ServedWeights:
    """Quantize the weights in ``folder`` as the settings say, and measure the loss afterwards.

    ``loss_before`` is the trained model's in nats per token over the validation rows of the
    settings, and ``bits_per_byte`` what one such nat is. Only the main rank calls this.
    """
    assert settings.quantize is not None
    model = meta_model(model_config(folder))
    sizes = quantize_folder(folder, model, settings.quantize)
    parameters = sum(each.numel() for each in model.parameters())
    loss = _loss(load_quantized(folder).to(_place(device, parameters)), validation, settings)
    return ServedWeights(
        kind=settings.quantize,
        bytes_before=sizes.before,
        bytes_after=sizes.after,
        bits_per_byte_before=loss_before * bits_per_byte,
        bits_per_byte_after=loss * bits_per_byte,
    )


def _place(device: torch.device, parameters: int) -> torch.device:
    """The device, or the CPU if the model does not fit beside what training still has there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < ROOM * 4 * parameters:
            return torch.device("cpu")
    return device


@torch.no_grad()
def _loss(model: Any, validation: PackedSplit, settings: TrainSettings) -> float:
    """Nats per token, over the rows that `validation_loss` takes."""
    rows = validation.batch(0, 0, min(settings.validation_sequences, validation.rows))
    total = 0.0
    for at in range(len(rows.inputs)):
        inputs, targets, positions = (
            part[at : at + 1].to(model.device)
            for part in (rows.inputs, rows.targets, rows.positions)
        )
        hidden = hidden_states(model, inputs, positions)
        total += next_token_loss(model, hidden.flatten(0, 1), targets.flatten(), "sum").item()
    return total / int((rows.targets != IGNORED).sum())
