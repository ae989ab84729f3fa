"""The base model: what it is, its tokenizer, and the layers that LoRA adapts."""

import math
from pathlib import Path

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.models.base_checks import check_lora_targets, check_vocabulary


def check_base(uri: str, lora_targets: list[str]) -> int:
    """Check a base model that is on this machine; returns its parameters, or 0 if unknown.

    A GGUF file must exist; its content is checked when it is converted. A model elsewhere is
    checked by the step that downloads it. ``lora_targets`` is empty unless LoRA trains. Raises
    `UserError` with what is wrong.
    """
    folder = _folder(uri)
    if folder is None:
        return 0
    from nudge.components.common.models.base_model import local_model, open_tokenizer
    from nudge.components.common.models.weights import WeightFiles

    folder = local_model(str(folder) if is_local(uri) else uri)
    check_vocabulary(folder, uri, len(open_tokenizer(folder, uri)))
    files = WeightFiles(folder)
    shapes = {name: files.shape(name) for name in files.names}
    if lora_targets:
        matrices = [
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if len(shape) == 2 and name.endswith(".weight")
        ]
        check_lora_targets(matrices, lora_targets)
    return sum(map(math.prod, shapes.values()))


def _folder(uri: str) -> Path | None:
    """The model's folder, if it is on this machine; None for a GGUF file and for other places."""
    if uri.startswith("hf://"):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        name, _, revision = uri.removeprefix("hf://").partition("@")
        try:
            found = try_to_load_from_cache(name, "config.json", revision=revision or None)
        except HFValidationError:
            raise UserError(
                f"base_model {uri}: {name!r} cannot be the name of a model; write hf://owner/name"
            ) from None
        return Path(found).parent if isinstance(found, str) else None
    if not uri or not is_local(uri):
        return None
    path = local_path(uri)
    return None if path.suffix == ".gguf" and path.is_file() else path
