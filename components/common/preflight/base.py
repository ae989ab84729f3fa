"""The base model: what it is, its tokenizer, and the layers that LoRA adapts."""

from pathlib import Path

from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.models.base_checks import (
    check_lora_targets,
    check_vocabulary,
    linear_names,
    weight_names,
)


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

    folder = local_model(str(folder) if is_local(uri) else uri)
    check_vocabulary(folder, uri, len(open_tokenizer(folder, uri)))
    weights = weight_names(folder, uri)
    if lora_targets:
        check_lora_targets(linear_names(weights), lora_targets)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // _bytes_each(folder)


def _folder(uri: str) -> Path | None:
    """The model's folder, if it is on this machine; None for a GGUF file and for other places."""
    if uri.startswith("hf://"):
        from huggingface_hub import try_to_load_from_cache

        name, _, revision = uri.removeprefix("hf://").partition("@")
        found = try_to_load_from_cache(name, "config.json", revision=revision or None)
        return Path(found).parent if isinstance(found, str) else None
    if not uri or not is_local(uri):
        return None
    path = local_path(uri)
    return None if path.suffix == ".gguf" and path.is_file() else path


def _bytes_each(folder: Path) -> int:
    """Bytes of one parameter in the files: those of the type that config.json names."""
    from nudge.components.common.models.base_checks import read_config

    values = read_config(folder, str(folder))
    kind = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return 4 if kind == "float32" else 2
