"""Write the trained weights as safetensors files with an index, one tensor at a time.

Every rank takes part, because sharded tensors are gathered; the main rank writes. Beyond the shard,
that takes the memory of one tensor, or of one layer for architectures whose files have other
tensors than the model (such as one per expert).
"""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from nudge.components.common.models.loading import base_name
from nudge.components.common.models.weights import INDEX, WEIGHTS
from nudge.components.train.models.adapt import PART_A, PART_B
from nudge.components.train.models.model import Start
from nudge.components.train.models.network import Network
from nudge.components.train.models.quantized import QuantizedLinear, dequantized
from nudge.components.train.settings import TrainSettings

MAX_FILE_BYTES = 5_000_000_000
"""The size above which weights are split into several files, as on the Hugging Face hub."""

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Unit:
    """Tensors of the model that become tensors of the files together; usually one of each."""

    names: tuple[str, ...]
    written: dict[str, tuple[int, ...]]
    """Names and shapes in the files."""


def export_dtype(start: Start, settings: TrainSettings) -> torch.dtype:
    """The dtype of the exported weights: the setting's; for ``auto`` the base model's own, or
    bfloat16 for a GGUF base, whose conversion to float32 is only temporary."""
    if settings.export_dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.export_dtype)
        return dtype
    if start.folder is None:
        return torch.float32
    if settings.base_model.lower().endswith(".gguf"):
        return torch.bfloat16
    return start.stored_dtype


def write_weights(
    folder: Path, network: Network, start: Start, settings: TrainSettings
) -> torch.dtype:
    """Write the trained weights, merged with their adapters, into ``folder`` on the main rank.

    Returns their dtype. Every rank must call this.
    """
    dtype, main = export_dtype(start, settings), network.ranks.main
    model = network.model
    units = _units(model)
    files = _files(units, dtype)
    tensors = _Tensors(network, start, settings)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        shapes = {key: shape for unit in part for key, shape in unit.written.items()}
        weight_map |= dict.fromkeys(shapes, name)
        converted = (tensors.converted(unit, dtype) for unit in part)
        if main:
            _write_file(folder / name, shapes, converted, dtype)
        else:
            for _ in converted:  # it takes part in gathering
                pass
    if main and len(files) > 1:
        total = sum(_bytes(unit, dtype) for unit in units)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return dtype


def write_config(folder: Path, model: Any, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    for name in config.sub_configs:
        if (sub := getattr(config, name, None)) is not None:
            sub.dtype = dtype
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def adapter_tensors(network: Network) -> dict[str, torch.Tensor]:
    """The adapter alone, in float32 on the CPU, under the names that peft uses in its files.

    Every rank must call this.
    """
    parts = {
        name: gathered(parameter).float().contiguous()
        for name, parameter in network.model.named_parameters()
        if name.endswith((PART_A, PART_B))
    }
    return {
        f"base_model.model.{name.replace('.default.', '.')}": part for name, part in parts.items()
    }


@torch.no_grad()
def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, gathered from all ranks if it is sharded."""
    own: Any = tensor.detach()
    full: torch.Tensor = own.full_tensor() if hasattr(own, "full_tensor") else own
    return full.cpu()


@dataclass(frozen=True)
class _Stored:
    """How the trained model stores a tensor of the base model."""

    shape: torch.Size
    tensor: torch.Tensor
    """The tensor, or the codes of a quantized one."""
    quantized: QuantizedLinear | None
    adapted: str
    """The path of the layer whose adapter changes this tensor; empty if none does."""


def _stored(model: Any) -> dict[str, _Stored]:
    """Every tensor of the base model by its name there, without tied copies."""
    kept, found = set(model.state_dict()), {}
    for full_name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path, _, attribute = full_name.rpartition(".")
        if "lora_" in full_name or full_name not in kept or attribute == "scales":
            continue
        layer = model.get_submodule(path)
        quantized = layer if attribute == "codes" and isinstance(layer, QuantizedLinear) else None
        if quantized is not None:
            attribute = "weight"
        shape = quantized.weight_shape if quantized else tensor.shape
        adapted = path.endswith(".base_layer") and attribute == "weight"
        name = f"{path}.{attribute}" if path else attribute
        found[base_name(name)] = _Stored(
            shape, tensor, quantized,
            path.removesuffix(".base_layer") if adapted else "",
        )  # fmt: skip
    return found


class _Tensors:
    """The trained tensors by their names in the base model, gathered one at a time."""

    def __init__(self, network: Network, start: Start, settings: TrainSettings) -> None:
        self._network, self._start, self._settings = network, start, settings
        self._stored = _stored(network.model)

    @torch.no_grad()
    def converted(self, unit: Unit, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors that the files get for a unit; on other ranks than the main one, nothing."""
        tensors = {name: self._merged(name) for name in unit.names}
        if not self._network.ranks.main:
            return {}
        if len(unit.names) > 1 or unit.names[0] not in unit.written:
            from transformers.core_model_loading import revert_weight_conversion

            tensors = revert_weight_conversion(self._network.model, tensors)
        return {name: tensors[name].to(dtype) for name in unit.written}

    def _merged(self, name: str) -> torch.Tensor:
        """A trained tensor; after LoRA W + (alpha / r) B A (Hu et al., arXiv:2106.09685).

        The sum is taken in float32. W is the base model's own weight, because the frozen copy may
        have been cast for speed; a quantized layer's is the dequantized one, with which the adapter
        was trained. Conv1D, GPT-2's linear layer, stores its weight transposed.
        """
        stored = self._stored[name]
        if self._settings.mode != "lora":
            return gathered(stored.tensor).float()
        codes = None if stored.quantized is None else gathered(stored.tensor)
        scales = None if stored.quantized is None else gathered(stored.quantized.scales)
        low = self._part(stored.adapted, PART_A) if stored.adapted else None
        high = self._part(stored.adapted, PART_B) if stored.adapted else None
        model = self._network.model
        if not self._network.ranks.main:
            return torch.empty(0)
        if codes is not None and scales is not None and stored.quantized is not None:
            base = dequantized(codes, scales, stored.quantized.kind)
        else:
            base = self._start.base_tensor(name, stored.shape, model)
        if low is not None and high is not None:
            delta = self._settings.lora_alpha / self._settings.lora_rank * (high @ low)
            layer: Any = model.get_submodule(stored.adapted)
            base += delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta
        return base

    def _part(self, stem: str, part: str) -> torch.Tensor:
        return gathered(self._network.model.get_parameter(f"{stem}.{part}")).float()


def _units(model: Any) -> list[Unit]:
    """The tensors of a model, in order, as they are written."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, revert_weight_conversion

    shapes = {name: stored.shape for name, stored in _stored(model).items()}
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    if not [each for each in mapping if not isinstance(each, PrefixChange)]:
        return [Unit((name,), {name: tuple(shape)}) for name, shape in shapes.items()]
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        layer = re.match(r"(.*?\.\d+)\.", name)
        tensor = torch.empty(shape, device="meta")
        groups.setdefault(layer[1] if layer else name, {})[name] = tensor
    return [
        Unit(
            tuple(group),
            {k: tuple(v.shape) for k, v in revert_weight_conversion(model, dict(group)).items()},
        )
        for group in groups.values()
    ]


def _bytes(unit: Unit, dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape in unit.written.values()) * dtype.itemsize


def _files(units: list[Unit], dtype: torch.dtype) -> list[list[Unit]]:
    """The units of each file, in order, so that a file has at most `MAX_FILE_BYTES`."""
    files: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if files[-1] and size + _bytes(unit, dtype) > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += _bytes(unit, dtype)
    return files


def _write_file(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    units: Iterator[dict[str, torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    """Write tensors as they come, in the order of ``shapes``.

    The format is a length, a JSON header, and the data (github.com/huggingface/safetensors). Its
    own package needs all tensors of a file in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [first, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensors in units:
            for tensor in tensors.values():
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
