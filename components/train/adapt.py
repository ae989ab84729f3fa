"""Which weights are trained: all of them, or low-rank adapters beside frozen weights (LoRA)."""

import warnings
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_checks import check_lora_targets
from nudge.components.train.settings import TrainSettings

PART_A, PART_B = "lora_A.default.weight", "lora_B.default.weight"


def adapt(model: Any, settings: TrainSettings, *, sharded: bool = False) -> Any:
    """Prepare ``model`` in place for the mode of the settings, and return it.

    The initial adapters are a pure function of the seed. Raises `UserError` if the model or one of
    its blocks lacks LoRA's target modules, or if `merged_state` cannot merge them.
    """
    model.train()
    if settings.mode != "lora":
        return model
    from peft import inject_adapter_in_model

    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    others = [name for name in settings.lora_targets if _is_elsewhere(model, name)]
    if not others:  # these have messages of their own below
        check_lora_targets(linear, settings.lora_targets)
    # Something may have drawn random numbers already, such as converting an uncached base model.
    torch.manual_seed(settings.seed)
    try:
        with warnings.catch_warnings():
            # peft warns that it sets this for Conv1D by itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            inject_adapter_in_model(lora_config(settings), model)
    except ValueError as error:
        raise UserError(f"train.lora_targets = {settings.lora_targets}: {error}") from None
    _check_targets(model, settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        # Frozen weights are only ever read in bfloat16, so cast them once instead of every step.
        # FSDP casts by itself, and needs a single dtype per group.
        if settings.precision == "bfloat16" and "lora_" not in name and not sharded:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_elsewhere(model: Any, target: str) -> bool:
    """Whether a target names only modules that are no linear layers of the blocks."""
    found = [
        module
        for name, module in model.named_modules()
        if name == target or name.endswith(f".{target}")
    ]
    return bool(found) and not any(map(_is_linear, found))


def _check_targets(model: Any, settings: TrainSettings) -> None:
    from peft.tuners.lora import LoraLayer

    # The loss reads the head's weight and not its adapter's (`next_token_loss`).
    head = getattr(model.get_output_embeddings(), "weight", None)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module.get_base_layer()
            linear = _is_linear(layer)
            if not linear or layer.weight is head:
                raise UserError(
                    f"train.lora_targets = {settings.lora_targets}: {name} is "
                    f"{'the output head' if linear else f'of type {type(layer).__name__}'}; choose "
                    "linear layers within the model's blocks, such as its attention projections"
                )


def lora_config(settings: TrainSettings) -> Any:
    """The LoRA settings as a peft ``LoraConfig``."""
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

    LoRA is merged as in Hu et al. (arXiv:2106.09685), W + (alpha / r) B A. The sum is taken in
    float32 and with the base model's own float32 weights, because the frozen copies may have been
    cast for speed. Conv1D, GPT-2's linear layer, stores its weight transposed.
    """
    if settings.mode != "lora":
        return {name: tensor.float() for name, tensor in state.items()}
    merged: dict[str, torch.Tensor] = base.state_dict()
    scale = settings.lora_alpha / settings.lora_rank
    for name, down in state.items():
        if name.endswith(PART_A):
            stem = name.removesuffix(f".{PART_A}")
            delta = scale * (state[f"{stem}.{PART_B}"].float() @ down.float())
            transposed = isinstance(base.get_submodule(stem), Conv1D)
            merged[f"{stem}.weight"] += delta.T if transposed else delta
    return merged


def adapter_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter alone, under the names that peft uses in its files."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.float().contiguous()
        for name, tensor in state.items()
        if name.endswith((PART_A, PART_B))
    }
