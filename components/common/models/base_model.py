"""The model that training starts from, as a Hugging Face folder on this machine's disk.

A URI names a base model: ``package://`` (a file in an installed package), ``file://`` or a path,
``s3://`` (a folder in the data connection), ``oci://`` (an image that contains a model),
``hf://<owner>/<name>[@<revision>]`` (the Hugging Face hub or its local cache),
``incumbent://<model>?else=<URI>`` (the version of a registered model that is served now; if none
is, the model after ``else``). ``#manifest_sha256=`` and the digest of an upload's manifest may
follow an ``s3://`` or ``oci://`` URI; other files are then refused. A GGUF file is converted once,
to float32 safetensors, into a cache.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts import model_files
from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.errors import UserError, one_line
from nudge.components.common.core.publish import published, sha256_file
from nudge.components.common.core.uris import is_local, local_path, scheme_of
from nudge.components.common.models.base_checks import check_tokenizer_files, read_config
from nudge.components.common.models.names import hub_hint
from nudge.components.common.models.registered import (
    check_download,
    download_model,
    pinned_uri,
    split_pin,
)

CONVERSION = 1
"""Increase this when the conversion changes, so that older converted folders are not reused."""

SIZES = ".sizes"
"""The file of a converted folder with the size of each other file."""

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def local_model(uri: str, *, trained: bool = True) -> Path:
    """The Hugging Face folder (config, tokenizer, safetensors) of a base model.

    Raises `UserError` if it cannot be found, is not a causal language model, or is quantized. A
    model that is not to be ``trained``, such as the version served now, may be quantized.
    """
    uri = resolved(uri)
    if scheme_of(uri) == "hf":
        folder = _from_hub(uri, MODEL_FILES)
    elif is_local(uri):
        path = local_path(uri)
        if not path.exists():
            raise UserError(
                f"base_model {uri}: {path} does not exist; name a folder or a .gguf file"
                f"{hub_hint(uri)}"
            )
        folder = _from_gguf(path) if path.suffix == ".gguf" else path
    else:
        folder = _downloaded(uri)
    _check_causal(folder, uri, trained=trained)
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"base_model {uri}: {folder} has no .safetensors (pickles are refused)")
    from nudge.components.common.models.weights import check_weights

    check_weights(folder)
    return folder


def local_tokenizer(uri: str) -> Path:
    """The folder of a base model's tokenizer, without downloading the weights.

    Raises `UserError` as `local_model` does.
    """
    uri = resolved(uri)
    if scheme_of(uri) == "hf":
        folder = _from_hub(uri, TOKENIZER_FILES)
    elif not is_local(uri):
        folder = _downloaded(uri, TOKENIZER_FILES, "-tokenizer")
    elif (path := local_path(uri)).suffix == ".gguf" and path.is_file():
        return _tokenizer_from_gguf(path)
    else:
        return local_model(uri)
    _check_causal(folder, uri)
    return folder


def resolved(uri: str) -> str:
    """The URI of the model itself; for an ``incumbent://`` URI, that of the version served now,
    pinned to its registered files (see `registered`).

    Raises `UserError` if no version is served and the URI has no ``else``, if the registry does not
    answer, or if the upload is not the registered one.
    """
    if scheme_of(uri) != "incumbent":
        return uri
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.clients.registry.releases import find_standing
    from nudge.components.common.core.provenance import this_run

    model, _, otherwise = uri.removeprefix("incumbent://").partition("?else=")
    found = with_registry(registry_url(), find_standing(model, this_run("")))
    if found and found[1]:
        return pinned_uri(found[1])
    if not otherwise:
        raise UserError(
            f"base_model {uri}: no version of {model!r} is served; add the base model of the first "
            f"version, as in incumbent://{model}?else=hf://owner/name"
        )
    return otherwise


def model_sha256(folder: Path) -> str:
    """Hex sha256 of a model's weights: of its safetensors files, sorted by name."""
    files = {path.name: sha256_file(path) for path in folder.glob("*.safetensors")}
    return model_files.weights_sha256(files)


def cache_folder() -> Path:
    """The folder of converted and downloaded models, in NUDGE_HOME or ``./.nudge``."""
    return nudge_home() / "base_models"


def _check_causal(folder: Path, uri: str, *, trained: bool = True) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    read_config(folder, uri, trained=trained)
    try:
        # Set trust_remote_code, because otherwise transformers asks a person at a terminal.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  a bad value raises anything
        raise UserError(
            f"base_model {uri}: its config.json cannot be read: {one_line(error)}"
        ) from None
    names = config.architectures or []
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not any(
        str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names
    ):
        raise UserError(
            f"base_model {uri} is {', '.join(map(str, names)) or config.model_type}, "
            "not a causal language model (such as LlamaForCausalLM); choose one that is"
        )


def open_tokenizer(folder: Path, uri: str) -> Any:
    """The tokenizer of a base model, from known code only.

    Raises `UserError` if it is in a form that this build cannot read, or damaged.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(folder, uri)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  tokenizers raises a plain Exception
        raise UserError(
            f"base_model {uri}: its tokenizer cannot be loaded: {one_line(error)}"
        ) from None


def _from_gguf(path: Path) -> Path:
    target = cache_folder() / f"{path.stem}-{sha256_file(path)[:16]}-{CONVERSION}"
    if _kept(target):
        return target
    import torch
    from transformers import AutoModelForCausalLM

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _gguf_errors(path), read_once():
        quantized = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = gguf_tokenizer(path)
    # transformers refuses to save a model that it loaded from GGUF, so copy its weights into a new
    # model whose config has no quantization.
    dropped = ("quantization_config", "_pre_quantization_dtype")
    values: dict[str, Any] = {
        key: value for key, value in quantized.config.to_dict().items() if key not in dropped
    }
    fresh = AutoModelForCausalLM.from_config(
        type(quantized.config)(**values), trust_remote_code=False
    )
    fresh.load_state_dict(quantized.state_dict())
    with published(target) as part:
        fresh.float().save_pretrained(part)
        tokenizer.save_pretrained(part)
        _note_sizes(part)
    return target


def _tokenizer_from_gguf(path: Path) -> Path:
    target = cache_folder() / f"{path.stem}-{sha256_file(path)[:16]}-{CONVERSION}-tokenizer"
    if not _kept(target):
        with _gguf_errors(path):
            tokenizer = gguf_tokenizer(path)
        with published(target) as part:
            tokenizer.save_pretrained(part)
            _note_sizes(part)
    return target


def _note_sizes(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / SIZES).write_text(json.dumps(sizes))


def _kept(folder: Path) -> bool:
    """Whether a converted model is in the cache and not damaged; a damaged one is made again.

    Only sizes, JSON and the headers of weights are checked: hashing 500 MB for each step would take
    longer than a small step does. The folder's modification time becomes now, for `nudge clean`.
    """
    if not folder.is_dir():
        return False
    sizes: dict[str, Any] = {}  # older conversions have none
    with contextlib.suppress(FileNotFoundError):
        try:
            sizes = dict(json.loads((folder / SIZES).read_bytes()))
        except (ValueError, TypeError):
            return False
    try:
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return False
        for path in folder.glob("*.json"):
            json.loads(path.read_bytes())
        if any(folder.glob("*.safetensors")):
            from nudge.components.common.models.weights import check_weights

            check_weights(folder)
    except (OSError, ValueError):  # `UserError` is one
        return False
    os.utime(folder)
    return True


def gguf_tokenizer(path: Path) -> Any:
    # AutoTokenizer would first read the complete file, only to look up this class: 8 s of 9.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)


@contextlib.contextmanager
def _gguf_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a GGUF causal language model: {error}") from None


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Cache what transformers requests from gguf repeatedly while it loads one file: the file's
    vocabulary, read id by id (twice), and the names of its tensors (once per module)."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in slow.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def _from_hub(uri: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = uri.removeprefix("hf://").partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise UserError(
            f"base_model {uri}: not in the local cache, and the hub cannot provide it ({error}); "
            "on a disconnected cluster, use an s3:// folder"
        ) from None


def _downloaded(uri: str, files: tuple[str, ...] = ("*",), kind: str = "") -> Path:
    plain, digest = split_pin(uri)
    target = cache_folder() / hashlib.sha256(plain.encode()).hexdigest()[:16]
    target = target.with_name(target.name + kind)
    shutil.rmtree(target, ignore_errors=True)  # the content at a URI may have changed
    with published(target) as part:
        download_model(plain, part, files)
        check_download(part, plain, digest, partial=files != ("*",))
    return target
