"""A base model in a bucket or on the hub: what its small files say before it is downloaded."""

import os
import tempfile
from pathlib import Path

from nudge.components.common.core.environment import S3_ENDPOINT
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.models.base_checks import read_config
from nudge.components.common.models.registered import split_pin

SMALL = ("config.json", "adapter_config.json")
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
HUB_PATIENCE_S = 15


def check_remote_base(uri: str) -> int:
    """Check a base model at an ``s3://`` or ``hf://`` URI; returns about how many parameters it
    has, or 0 if that cannot be known here.

    Raises `UserError` if there is no model, or if its ``config.json`` is that of a quantized model
    or an adapter. A store or hub that this machine cannot reach is no problem of the model.
    """
    if uri.startswith("s3://") and os.environ.get(S3_ENDPOINT):
        return _in_bucket(uri)
    return _on_hub(uri) if uri.startswith("hf://") else 0


def _in_bucket(uri: str) -> int:
    from nudge.components.common.clients.store import open_store

    plain, _ = split_pin(uri)
    store = open_store(plain)
    try:
        files = store.list()
    except Transient:
        return 0
    with tempfile.TemporaryDirectory() as place:
        for name in SMALL:
            if name in files:
                store.get(name, Path(place, name))
        if not (set(SMALL) & set(files)):
            raise UserError(
                f"base_model {uri} has no config.json; name the folder of a model in the bucket"
            )
        config = read_config(Path(place), uri)
    size = sum(file.bytes for name, file in files.items() if name.endswith(".safetensors"))
    if not size:
        raise UserError(f"base_model {uri} has no .safetensors (pickles are refused)")
    # Without a dtype, the largest usual one: a model that is too large is still too large.
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return size // DTYPE_BYTES.get(dtype, 4)


def _on_hub(uri: str) -> int:
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:  # whoever only submits may lack it
        return 0
    name, _, revision = uri.removeprefix("hf://").partition("@")
    try:
        config = hf_hub_download(name, "config.json", revision=revision or None)
        read_config(Path(config).parent, uri)
    except GatedRepoError:
        raise UserError(
            f"base_model {uri}: the hub gives this model only to those who accepted its license; "
            "accept it there, and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"base_model {uri}: {name} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"base_model {uri}: the hub has no model {name}, or only for others (HF_TOKEN)"
        ) from None
    except EntryNotFoundError as error:
        if isinstance(error, HfHubHTTPError):
            raise UserError(f"base_model {uri} has no config.json; is it a model?") from None
        return 0  # it is not in the cache, and there is no network
    except (HfHubHTTPError, OSError, ValueError):
        return 0
    try:
        info = HfApi().model_info(
            name, revision=revision or None, timeout=HUB_PATIENCE_S, expand=["safetensors"]
        )
    except Exception:  # noqa: BLE001  whatever its HTTP library raises: the size stays unknown
        return 0
    return info.safetensors.total if info.safetensors else 0
