"""The config of the model that a recipe trains, found without downloading its weights."""

import json
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.uris import is_local, local_path, scheme_of
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.train.settings import TrainSettings


class ConfigNotHere(UserError):
    """The model's config is not on this machine."""


SHAPES = Path(__file__).parents[1] / "recipes" / "shapes"
"""config.json of public models, named OWNER--NAME.json, so that their recipes work offline."""


def model_config(train: TrainSettings, tokenize: TokenizeSettings, file: Path | None = None) -> Any:
    """The transformers config of the model to train.

    ``file`` is a config.json that takes precedence. Raises `UserError` if the config is not on this
    machine, or if transformers does not know the architecture.
    """
    if file is not None:
        return _read(file, str(file))
    if train.mode == "scratch":
        return _fresh(train, tokenize)
    uri = base_of(train.base_model)
    if is_local(uri):
        return _local(uri)
    if scheme_of(uri) == "hf":
        name = uri.removeprefix("hf://").partition("@")[0]
        shape = SHAPES / f"{name.replace('/', '--')}.json"
        found = _cached(name) or (shape if shape.is_file() else None)
        if found:
            return _read(found, uri)
    raise ConfigNotHere(
        f"base_model {uri}: its config.json is not on this machine; download it from the model's "
        "page and pass it with --config config.json"
    )


def base_of(uri: str) -> str:
    """A base model's URI; of ``incumbent://MODEL?else=URI``, the one that the first run trains."""
    return (uri.partition("?else=")[2] or uri) if uri.startswith("incumbent://") else uri


def _fresh(train: TrainSettings, tokenize: TokenizeSettings) -> Any:
    from nudge.components.train.models.model import llama_shape

    values: dict[str, Any] = {"vocab_size": tokenize.vocab_size}
    if train.model_size:
        values |= llama_shape(train.model_size, tokenize.vocab_size)
    return _parsed(values | train.model_config, "train.model_config")


def _local(uri: str) -> Any:
    path = local_path(uri)
    if path.suffix == ".gguf" and path.is_file():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    if not (path / "config.json").is_file():
        raise UserError(f"base_model {uri}: {path} has no config.json; name a model folder")
    return _read(path / "config.json", uri)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def _read(file: Path, where: str) -> Any:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {file} is not a readable config.json: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: {file} is not a config.json: it is no JSON object")
    return _parsed(values, where)


def _parsed(values: dict[str, Any], where: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(values.get("model_type", ""))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{where}: model_type {kind!r} is not a causal language model that transformers knows"
        )
    try:
        return AutoConfig.for_model(kind, **{k: v for k, v in values.items() if k != "model_type"})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: transformers cannot read the config: {error}") from None
