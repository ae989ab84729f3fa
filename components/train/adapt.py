"""What of a model is trained: all of it, or low-rank adapters beside frozen weights (LoRA)."""

import warnings
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nudge.components.common.core.errors import UserError
from nudge.components.train.settings import TrainSettings

PART_A, PART_B = "lora_A.default.weight", "lora_B.default.weight"


def adapt(model: Any, settings: TrainSettings, *, sharded: bool = False) -> Any:
    """Prepare ``model`` for training in the mode of the settings; returns it, changed in place.

    Adapters begin as a pure function of the seed. Raises `UserError` if LoRA's target modules are
    not in the model, or are none that `merged_state` can merge.
    """
    model.train()
    if settings.mode != "lora":
        return model
    from peft import inject_adapter_in_model

    # Whatever drew random numbers before, such as the conversion of a base model not yet cached.
    torch.manual_seed(settings.seed)
    try:
        with warnings.catch_warnings():
            # Of Conv1D peft warns that it sets this by itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            inject_adapter_in_model(lora_config(settings), model)
    except ValueError as error:
        raise UserError(f"train.lora_targets = {settings.lora_targets}: {error}") from None
    _check_targets(model, settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        # Frozen weights are only ever read in bfloat16, so the cast is paid once, not a step.
        # FSDP does it by itself, and wants one dtype in a group.
        if settings.precision == "bfloat16" and "lora_" not in name and not sharded:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _check_targets(model: Any, settings: TrainSettings) -> None:
    from peft.tuners.lora import LoraLayer

    # The loss reads the head's weight and not its adapter's (`next_token_loss`).
    head = getattr(model.get_output_embeddings(), "weight", None)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module.get_base_layer()
            linear = isinstance(layer, nn.Linear | Conv1D)
            if not linear or layer.weight is head:
                raise UserError(
                    f"train.lora_targets = {settings.lora_targets}: {name} is "
                    f"{'the head' if linear else f'of {type(layer).__name__}'}; name linear layers "
                    "within the model's blocks, such as those of its attention"
                )


def lora_config(settings: TrainSettings) -> Any:
    """The settings of LoRA as peft has them."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(settings.lora_targets),
        task_type="CAUSAL_LM",
    )


def merged_state(
    state: dict[str, torch.Tensor], settings: TrainSettings, base: Any
) -> dict[str, torch.Tensor]:
    """The trained weights as a float32 state dict of the architecture of ``base``.

    LoRA is merged as Hu et al. (arXiv:2106.09685) give it, W + (alpha / r) B A, in float32 and into
    the base model's own float32 weights, since the frozen copies may have been cast for speed.
    Conv1D, GPT-2's linear layer, has its weight the other way round.
    """
    if settings.mode != "lora":
        return {name: tensor.float() for name, tensor in state.items()}
    merged: dict[str, torch.Tensor] = base.state_dict()
    scale = settings.lora_alpha / settings.lora_rank
    for name, down in state.items():
        if name.endswith(PART_A):
            stem = name.removesuffix(f".{PART_A}")
            delta = scale * (state[f"{stem}.{PART_B}"].float() @ down.float())
            turned = isinstance(base.get_submodule(stem), Conv1D)
            merged[f"{stem}.weight"] += delta.T if turned else delta
    return merged


def adapter_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter alone, named as peft's own files name it."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.float().contiguous()
        for name, tensor in state.items()
        if name.endswith((PART_A, PART_B))
    }
