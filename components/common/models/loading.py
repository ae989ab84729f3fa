"""Load a causal language model without a second copy of its weights.

The model is built on torch's meta device, which has shapes and no memory. `fill` then replaces each
parameter by the part that this rank owns, read from the files into its final dtype and device.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.weights import WeightFiles


@dataclass(frozen=True)
class Source:
    """The tensors in the files from which a tensor of the model is made.

    Without a ``converter`` it is one tensor, copied. With one, transformers computes it from
    several, such as the experts of Mixtral: (name in the files, pattern of the converter).
    """

    parts: tuple[tuple[str, str], ...]
    converter: Any = None


def model_config(folder: Path) -> Any:
    """The config of a model folder; raises `UserError` if it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its config.json cannot be read: {error}") from None


def meta_model(config: Any) -> Any:
    """The model of a config in float32, in evaluation mode: parameters on the meta device, buffers
    on the CPU with their values."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import meta_device_safe_creation_ops

    with torch.device("meta"), meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    _initialize_buffers(model)
    return model.eval()


def _initialize_buffers(model: nn.Module) -> None:
    """Compute the buffers, such as rotary frequencies, as transformers does when it loads."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    parameters: list[Any] = list(model.parameters())
    for parameter in parameters:
        parameter._is_hf_initialized = True
    initialize: Any = model
    initialize.initialize_weights()
    for parameter in parameters:
        del parameter._is_hf_initialized


def tensor_sources(model: Any, files: WeightFiles) -> dict[str, Source]:
    """Where each parameter and persistent buffer of a `meta_model` is in the files.

    Unties weights that the config ties although the files have two different ones. Raises
    `UserError` if the files lack a tensor or have one of another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    expected = model.state_dict()
    found: dict[str, Source] = {}
    for key in sorted(files.names, key=dot_natural_key):
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, expected
        )
        if pattern is None:
            found[name] = Source(((key, key),))
            continue
        earlier = found.get(name, Source((), by_pattern[pattern]))
        found[name] = Source((*earlier.parts, (key, pattern)), earlier.converter)
    _untie(model, files, found)
    sources = _by_target(model, found, list(expected))
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        for one, other in ((target, source), (source, target)):
            if one in sources:
                sources.setdefault(other, sources[one])
    _check_complete(model, files, sources, expected)
    return sources


def _by_target(model: Any, found: dict[str, Source], expected: list[str]) -> dict[str, Source]:
    """The sources of the tensors that the model has, including all results of a converter."""
    sources = {name: source for name, source in found.items() if name in set(expected)}
    for name, source in found.items():
        if source.converter is not None:
            # A converter that splits a tensor names its first result; the others share the rest.
            targets = [p.replace("\\", "") for p in source.converter.target_patterns]
            for target in targets[1:]:
                other = name.replace(targets[0], target)
                if other in set(expected):
                    sources[other] = source
    return sources


def _untie(model: Any, files: WeightFiles, found: dict[str, Source]) -> None:
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target, source in tied.items():
        if target not in found or source not in found:
            continue
        one, other = (files.tensor(found[name].parts[0][0]) for name in (target, source))
        if torch.equal(one, other):
            continue
        module, _, attribute = target.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, attribute, nn.Parameter(torch.empty_like(getattr(owner, attribute))))
        model.all_tied_weights_keys.pop(target)
        model.config.tie_word_embeddings = False


def _check_complete(
    model: Any, files: WeightFiles, sources: dict[str, Source], expected: dict[str, torch.Tensor]
) -> None:
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    buffers = {name for name, _ in model.named_buffers()}
    missing = [
        name
        for name in expected
        if name not in sources
        and name not in buffers
        and not any(pattern.search(name) for pattern in optional)
    ]
    if missing:
        raise UserError(
            f"the model in {files.folder} lacks {len(missing)} of the weights that its config.json "
            f"names, such as {missing[0]}; download it again"
        )
    for name, source in sources.items():
        if source.converter is None:
            shape = files.shape(source.parts[0][0])
            if shape != tuple(expected[name].shape):
                raise UserError(
                    f"the model in {files.folder} cannot be loaded: {name} has the shape "
                    f"{list(shape)}, but config.json makes it {list(expected[name].shape)}"
                )


def base_name(name: str) -> str:
    """The name of a parameter in the base model, without what peft adds to it."""
    return name.replace(".base_layer.", ".")


class Filler:
    """Fills the meta parameters of a model, which may be sharded or have adapters by now.

    A module with ``from_rows`` computes its parameters from rows of the weight that it replaces.
    ``initial`` returns a value for a parameter that is not in the files, such as an adapter's.
    """

    def __init__(self, files: WeightFiles, sources: dict[str, Source]) -> None:
        self.files, self.sources = files, sources
        self._converted: dict[str, torch.Tensor] = {}

    def fill(
        self,
        model: Any,
        device: torch.device,
        initial: Callable[[str, torch.Tensor], torch.Tensor | None] = lambda name, meta: None,
    ) -> None:
        """Replace every meta parameter by this rank's part on ``device``; move the rest there."""
        owners: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
        for path, module in model.named_modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{attribute}" if path else attribute
                owners.setdefault(parameter, []).append((name, module, attribute))
        for parameter, places in owners.items():
            if parameter.is_meta:
                filled = self._filled(parameter, places, device, initial, model)
                for _, module, attribute in places:
                    setattr(module, attribute, filled)
        for path, module in model.named_modules():
            for attribute, buffer in module.named_buffers(recurse=False):
                name = base_name(f"{path}.{attribute}" if path else attribute)
                if name in self.sources:
                    self._read(name, buffer, 0, model)
        self._converted.clear()
        _move(model, device)

    def _filled(
        self, parameter: nn.Parameter, places: list[tuple[str, nn.Module, str]],
        device: torch.device, initial: Any, model: Any,
    ) -> nn.Parameter:  # fmt: skip
        sharded: Any = parameter if isinstance(parameter, DTensor) else None
        shape, first = tuple(parameter.shape), 0
        if sharded is not None:
            shape, offset = compute_local_shape_and_global_offset(
                sharded.shape, sharded.device_mesh, sharded.placements
            )
            first = offset[0] if offset else 0
        local = torch.empty(shape, dtype=parameter.dtype, device=device)
        path, owner, attribute = places[0]
        module: Any = owner
        names = [base_name(each) for each, *_ in places]
        name = next((each for each in names if each in self.sources), None)
        if name is not None:
            self._read(name, local, first, model)
        elif hasattr(module, "from_rows"):
            weight = torch.empty(shape[0], module.in_features, dtype=torch.float32)
            self._read(f"{names[0].removesuffix(attribute)}weight", weight, first, model)
            local.copy_(module.from_rows(attribute, weight))
        else:
            value = initial(path, parameter)
            if value is None:
                raise AssertionError(f"no value for {path}")
            local.copy_(value[first : first + len(local)] if local.dim() else value)
        filled: torch.Tensor = local
        if sharded is not None:
            filled = DTensor.from_local(
                local, sharded.device_mesh, sharded.placements, run_check=False,
                shape=parameter.shape, stride=parameter.stride(),
            )  # fmt: skip
        return nn.Parameter(filled, requires_grad=parameter.requires_grad)

    def whole(self, name: str, shape: torch.Size, model: Any) -> torch.Tensor:
        """A complete tensor of the files in float32, by its name in the model."""
        tensor = torch.empty(shape, dtype=torch.float32)
        self._read(name, tensor, 0, model)
        return tensor

    @torch.no_grad()
    def _read(self, name: str, into: torch.Tensor, first: int, model: Any) -> None:
        source = self.sources[name]
        if source.converter is None:
            self.files.read(source.parts[0][0], into, first)
        else:
            whole = self._convert(name, source, model)
            into.copy_(whole[first : first + len(into)])

    def _convert(self, name: str, source: Source, model: Any) -> torch.Tensor:
        if name not in self._converted:
            converter = copy.deepcopy(source.converter)
            for key, pattern in source.parts:
                converter.add_tensor(name, key, pattern, self.files.tensor(key))
            values = converter.convert(name, model=model, config=model.config)
            self._converted = {
                key: value[0] if isinstance(value, list) else value for key, value in values.items()
            }
        return self._converted[name]


def _move(model: nn.Module, device: torch.device) -> None:
    """Move buffers and parameters that are not sharded."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, DTensor) and parameter.device != device:
                parameter.data = parameter.data.to(device)


@contextlib.contextmanager
def _folder_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: transformers cannot build it: {error}") from None


def empty_model(folder: Path) -> tuple[Any, Filler]:
    """The model of a folder on the meta device, and what fills it.

    Raises `UserError` if its files are damaged, or do not fit its config.
    """
    files = WeightFiles(folder)
    config = model_config(folder)
    if quantization := getattr(config, "quantization_config", None):
        method = dict(quantization).get("quant_method", "an unknown method")
        raise UserError(
            f"{folder} is already quantized ({method}); use the model that it was made from"
        )
    with _folder_errors(folder):
        model = meta_model(config)
    _read_generation_config(model, folder)
    return model, Filler(files, tensor_sources(model, files))


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
