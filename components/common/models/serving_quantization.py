"""Quantize an exported model folder for serving, in the format of compressed-tensors.

vLLM and transformers load that format. The schemes are standard ones that need no calibration text:
weights are rounded to the nearest code, with scales from the largest weight of each row or group.

- ``fp8`` and ``int8``: 8-bit weights with one scale per output row. Activations are quantized while
  serving, with one scale per token (`FP8_DYNAMIC` and `W8A8`), so the server multiplies in 8 bits.
- ``int4``: 4-bit weights with one scale per group of columns; activations are not quantized
  (`W4A16`).

The linear layers are quantized; embeddings, head, norms and biases stay.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nudge.components.common.core.errors import UserError, one_line
from nudge.components.common.models.weights import INDEX, WeightFiles

Kind = Literal["fp8", "int8", "int4"]

PRESETS: dict[str, str] = {"fp8": "FP8_DYNAMIC", "int8": "W8A8", "int4": "W4A16"}
"""Names of the schemes in compressed-tensors."""
GROUPS = (128, 64, 32)
"""Columns per scale of int4: the group sizes for which vLLM has kernels, the preset's first."""
METHOD = "compressed-tensors"


@dataclass(frozen=True)
class Sizes:
    """Bytes of all weight files, before and after quantization."""

    before: int
    after: int


def quantization_of(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a model folder's config.json; empty if it has none."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return dict(values.get("quantization_config") or {})


def quantizable_layers(model: nn.Module, kind: Kind) -> dict[str, nn.Linear]:
    """The layers of a causal language model that `quantize_folder` quantizes, by name.

    The model may be on the meta device. Raises `UserError` if its architecture keeps weights
    elsewhere than in linear layers, if no group size divides the layers' columns, or if
    compressed-tensors is not installed.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError(
            f"upload.quantize = {kind} needs the Python package compressed-tensors, which is not "
            "installed here; install the extra: pip install 'nudge-lm[train]'"
        )
    owner: Any = model
    head, layers = owner.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            layers[name] = module
        elif any(each.dim() > 2 for each in module.parameters(recurse=False)):
            raise UserError(
                f"upload.quantize = {kind}: {type(model).__name__} has weights outside of linear "
                f"layers, in {name} ({type(module).__name__}), such as those of experts; nudge "
                "does not quantize them. Remove upload.quantize"
            )
    if not layers:
        raise UserError(
            f"upload.quantize = {kind}: {type(model).__name__} has no linear layers besides its "
            "head; remove upload.quantize"
        )
    if kind == "int4":
        _group_size(layers)
    return layers


@torch.no_grad()
def quantize_folder(folder: Path, model: nn.Module, kind: Kind) -> Sizes:
    """Replace the weights in ``folder`` by quantized ones, and say so in its config.json.

    ``model`` is the architecture; its weights are not used. The memory taken is that of one
    quantized file. Repeating it with the same weights gives the same bytes. Raises `UserError` as
    `quantizable_layers` does, and if the folder is quantized already.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
    from safetensors import safe_open
    from safetensors.torch import save_file

    if quantization_of(folder):
        raise UserError(f"{folder} is already quantized; use the model that it was made from")
    layers = quantizable_layers(model, kind)
    scheme = _scheme(layers, kind)
    before = WeightFiles(folder).bytes
    missing = {f"{name}.weight" for name in layers}
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if name in missing:
                    missing.remove(name)
                    stem = name.removesuffix("weight")
                    parts = _compressed(tensor, scheme)
                    tensors |= {f"{stem}{part}": each for part, each in parts.items()}
                else:
                    tensors[name] = tensor.clone()
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        part = path.with_name(f"{path.name}.part")
        save_file(tensors, part, {"format": "pt"})
        shutil.copymode(path, part)
        os.replace(part, path)
    if missing:
        raise UserError(
            f"upload.quantize = {kind}: the weight files name the layers otherwise than "
            f"{type(model).__name__} does ({min(missing)} is not in them), so nudge cannot "
            "quantize them; remove upload.quantize"
        )
    if (folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    rest = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in layers
    ]
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=rest,
        format=scheme.format,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = {
        **config.model_dump(mode="json"),
        "version": compressed_tensors.__version__,
    }
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")
    return Sizes(before, WeightFiles(folder).bytes)


def load_quantized(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a quantized causal LM for computing on any device, in evaluation mode.

    The weights are the dequantized ones, and activations are rounded as the scheme says, so that
    the model predicts what a server does, but not as fast. Raises `UserError` if the folder has
    another format than compressed-tensors, or if its files are damaged.
    """
    from compressed_tensors.offload import as_single_threaded
    from transformers import AutoModelForCausalLM

    method = quantization_of(folder).get("quant_method", "an unknown method")
    if method != METHOD:
        raise UserError(f"{folder} is quantized with {method}; nudge reads only {METHOD}")
    WeightFiles(folder)
    # One of several ranks may call this alone; the library would wait for the others.
    with _quiet(), as_single_threaded():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        except (ValueError, RuntimeError, KeyError, ImportError) as error:
            raise UserError(f"{folder} cannot be loaded: {one_line(error)}") from None
        # Otherwise only the first call of the complete model does this, and nudge calls its parts.
        model.hf_quantizer.compressor.decompress_model(model)
    return model.eval()


def _scheme(layers: Mapping[str, nn.Linear], kind: Kind) -> Any:
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(PRESETS[kind], ["Linear"])
    if kind == "int4":
        scheme.weights.group_size = _group_size(layers)
    scheme.format = infer_module_format(nn.Linear, scheme)
    return scheme


def _group_size(layers: Mapping[str, nn.Linear]) -> int:
    for size in GROUPS:
        if all(layer.in_features % size == 0 for layer in layers.values()):
            return size
    name, width = next(
        (name, layer.in_features)
        for name, layer in layers.items()
        if layer.in_features % GROUPS[-1]
    )
    raise UserError(
        f"upload.quantize = int4: {name} has {width} columns, which no group size of "
        f"{', '.join(map(str, GROUPS))} divides; use fp8 or int8"
    )


def _compressed(weight: torch.Tensor, scheme: Any) -> dict[str, torch.Tensor]:
    """The tensors that the files get for a weight [out, in]."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    group = scheme.weights.group_size
    rows = weight.float().reshape(len(weight), -1, group or weight.shape[1])
    scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    if group:  # vLLM computes with such scales in the model's dtype, with others in float32
        scale = scale.to(weight.dtype)
    # In bfloat16, the quotient would be rounded before it is rounded to a code.
    values = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    parts = compressor.compress({name: each.float() for name, each in values.items()}, scheme)
    parts["weight_scale"] = scale
    return {name: tensor.contiguous() for name, tensor in parts.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of the libraries, which would break into nudge's own."""
    from loguru import logger
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logger.disable("compressed_tensors")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.enable("compressed_tensors")
        if shown:
            logging.enable_progress_bar()
