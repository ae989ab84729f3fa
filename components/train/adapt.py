"""What of a model is trained: all of it, or low-rank adapters beside frozen weights (LoRA)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nudge.components.common.errors import UserError
from nudge.components.common.language_model import load_model
from nudge.components.train.settings import TrainSettings


def adapt(model: Any, settings: TrainSettings) -> Any:
    """Prepare ``model`` for training in the mode of the settings; returns it, changed in place.

    Raises `UserError` if LoRA's target modules are not in the model.
    """
    model.train()
    if settings.mode == "full":
        return model
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(settings.lora_targets),
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(f"train.lora_targets = {settings.lora_targets}: {error}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if settings.precision == "bfloat16" and "lora_" not in name:
            # Frozen weights are only ever read in bfloat16, so the cast is paid once, not a step.
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def merged_state(model: Any, settings: TrainSettings, base: Path) -> dict[str, torch.Tensor]:
    """The trained weights as a float32 state dict of the base architecture.

    LoRA is merged as Hu et al. (arXiv:2106.09685) give it, W + (alpha / r) B A, in float32 and into
    the base model's own float32 weights, since the frozen copies may have been cast for speed.
    """
    if settings.mode == "full":
        return {name: tensor.float() for name, tensor in model.state_dict().items()}
    merged: dict[str, torch.Tensor] = load_model(base).state_dict()
    scale = settings.lora_alpha / settings.lora_rank
    for name, down, up in _adapters(model):
        merged[name] += scale * (up.float() @ down.float())
    return merged


def _adapters(model: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    state = model.state_dict()
    for name, down in state.items():
        if name.endswith("lora_A.default.weight"):
            stem = name.removesuffix("lora_A.default.weight")
            yield f"{stem}weight", down, state[f"{stem}lora_B.default.weight"]
