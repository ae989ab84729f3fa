"""Which weights are trained: all of them, or low-rank adapters beside frozen weights (LoRA)."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_checks import check_lora_targets
from nudge.components.train.models.quantized import quantize_layers
from nudge.components.train.settings import TrainSettings

PART_A, PART_B = "lora_A.default.weight", "lora_B.default.weight"


def adapt(model: Any, settings: TrainSettings) -> Any:
    """Prepare ``model`` in place for the mode of the settings, and return it.

    Its frozen weights get the dtype of the setting `base_dtype`; int8 and nf4 need a model on the
    meta device.

    The initial adapters are a pure function of the seed. Raises `UserError` if the model or one of
    its blocks lacks LoRA's target modules, or if `exported_weights` cannot merge them.
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
    meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        with warnings.catch_warnings():
            # peft warns that it sets this for Conv1D by itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            inject_adapter_in_model(lora_config(settings), model, low_cpu_mem_usage=meta)
    except ValueError as error:
        raise UserError(f"train.lora_targets = {settings.lora_targets}: {error}") from None
    _check_targets(model, settings)
    # With precision bfloat16, frozen weights are only ever read in bfloat16.
    stored = settings.precision if settings.base_dtype == "auto" else settings.base_dtype
    half = stored == "bfloat16" or (stored != "float32" and settings.precision == "bfloat16")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if half and "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    if stored in ("int8", "nf4"):
        quantize_layers(model, stored)
    return model


def initial_adapters(
    model: Any, settings: TrainSettings
) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """A function that returns the initial value of an adapter's part on the meta device, by name.

    It must be called in the order of the model's modules; the values are then those that peft draws
    for a model that is not on the meta device: B is zero, and A the last of three draws.
    """
    generator = torch.Generator().manual_seed(settings.seed)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        empty = torch.empty(like.shape, dtype=torch.float32)
        return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    def initial(name: str, meta: torch.Tensor) -> torch.Tensor | None:
        if name.endswith(PART_B):
            return torch.zeros(meta.shape)
        if not name.endswith(PART_A):
            return None
        drawn(meta)
        drawn(model.get_parameter(f"{name.removesuffix(PART_A)}{PART_B}"))
        return drawn(meta)

    return initial


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
