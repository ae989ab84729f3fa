"""What a folder of a base model must be, read from its files without torch, in milliseconds."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError

BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
"""The first number in a module's name is that of its block: ``model.layers.7.mlp.up_proj``."""
SENTENCEPIECE = "tokenizer.model"
TEMPLATE = "chat_template.jinja"


def read_config(folder: Path, uri: str, *, trained: bool = True) -> dict[str, Any]:
    """The values of ``config.json``.

    Raises `UserError` if it is missing or not an object, or if the folder is that of an adapter or,
    unless it is not to be ``trained``, of a quantized model, whose weights cannot be trained.
    """
    path = folder / "config.json"
    adapter = folder / "adapter_config.json"
    if not path.is_file() and adapter.is_file():
        base = _object(adapter, uri).get("base_model_name_or_path") or "its base model"
        raise UserError(
            f"base_model {uri} is only an adapter of {base}; merge it into that model first "
            "(merge_and_unload in peft), or name that model"
        )
    if not path.is_file():
        raise UserError(f"base_model {uri}: {folder} has no config.json; name a model folder")
    values = _object(path, uri)
    quantization = values.get("quantization_config")
    if isinstance(quantization, dict) and trained:
        method = quantization.get("quant_method") or "quantization_config"
        raise UserError(
            f"base_model {uri} is quantized ({method}), and quantized weights cannot be trained; "
            "name the model that it was made from"
        )
    return values


def read_template(path: Path) -> str:
    """The text of a chat template's file; raises `UserError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the chat template {path} is not UTF-8 text: {error}") from None


def check_tokenizer_files(folder: Path, uri: str) -> None:
    """Raise `UserError` if the tokenizer or its chat template is in a form that this build cannot
    read."""
    for path in (folder / TEMPLATE, *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        if path.is_file():
            read_template(path)
    if (folder / "tokenizer.json").is_file():
        return
    tiktoken = sorted(folder.glob("*.tiktoken"))
    model = folder / SENTENCEPIECE
    if model.is_file():
        with model.open("rb") as file:
            # A SentencePiece model is a protobuf whose first field is a piece; tiktoken's file has
            # a line "base64 rank" for each token.
            kind = "SentencePiece" if file.read(1) == b"\n" else "tiktoken"
    elif tiktoken:
        model, kind = tiktoken[0], "tiktoken"
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return
    else:
        raise UserError(
            f"base_model {uri}: {folder} has no tokenizer.json; save the model's tokenizer there"
        )
    raise UserError(
        f"base_model {uri} has only a {kind} tokenizer ({model.name}), which this build cannot "
        "read; make a tokenizer.json once: pip install transformers sentencepiece tiktoken, then "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )


def check_vocabulary(folder: Path, uri: str, tokens: int) -> None:
    """Raise `UserError` if the tokenizer has more ``tokens`` than the model has embeddings."""
    values = read_config(folder, uri)
    text = values.get("text_config")
    rows = values.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    if isinstance(rows, int) and tokens > rows:
        raise UserError(
            f"base_model {uri}: its tokenizer has {tokens} tokens, but the model has embeddings "
            f"for {rows}; resize those (resize_token_embeddings in transformers) and save the "
            "model, or remove the added tokens"
        )


def check_lora_targets(modules: Iterable[str], targets: Sequence[str]) -> None:
    """Raise `UserError` unless each target names a module, and some target names one in each block.

    ``modules`` are the names of linear layers, such as ``model.layers.0.self_attn.q_proj``; a
    target matches a name or its end, as in peft.
    """
    names = sorted(modules)
    blocks: dict[str, set[str]] = {}
    for name in names:
        if match := BLOCK.search(name):
            blocks.setdefault(match[1], set()).add(name)
    leaves = sorted({name.rpartition(".")[2] for each in blocks.values() for name in each})
    exist = f"the linear layers of its blocks are {', '.join(leaves) or 'unknown'}"
    setting = f"train.lora_targets = {list(targets)}"
    unmatched = [each for each in targets if not any(_matches(name, each) for name in names)]
    if unmatched:
        raise UserError(
            f"{setting}: this model has no {', '.join(unmatched)}; {exist}; set train.lora_targets "
            "to those to adapt"
        )
    bare = [
        number
        for number, each in sorted(blocks.items(), key=lambda item: int(item[0]))
        if not any(_matches(name, target) for name in each for target in targets)
    ]
    if bare and len(bare) < len(blocks):
        raise UserError(
            f"{setting}: none of them is in block {', '.join(bare[:4])}"
            f"{' and others' if len(bare) > 4 else ''} of {len(blocks)}; {exist}; add those of the "
            "other blocks"
        )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _object(path: Path, uri: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"base_model {uri}: {path.name} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"base_model {uri}: {path.name} is a JSON {type(values).__name__}, not an object"
        )
    return values
