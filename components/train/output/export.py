"""Makes a saved model folder one that older releases of transformers read the same way.

transformers 5 writes three things that 4.57, which many servers still have, ignores or rejects:
``rope_parameters`` instead of ``rope_theta`` and ``rope_scaling``, so that the positions of every
model whose theta is not 10,000 would be wrong; the tokenizer class ``TokenizersBackend``; and
special tokens as a list named ``extra_special_tokens``. transformers 5 reads the older names too.
"""

import json
from pathlib import Path
from typing import Any

from nudge.components.common.models.end_of_document import end_ids

READABLE = 0o644
"""safetensors makes its files readable by their owner only, and a server runs as another user."""
OLD_CLASS = "PreTrainedTokenizerFast"
FULL, SLIDING = "full_attention", "sliding_attention"


def finish_export(folder: Path, end_of_document: int | None) -> None:
    """Complete the files of a model folder that transformers 5 saved.

    The generation configuration stays the base's; the token ``end_of_document`` is added to those
    that end a text, because training taught the model to write it there.
    """
    _change(folder / "config.json", _add_rope)
    _change(folder / "tokenizer_config.json", _rename_tokenizer)
    if end_of_document is not None:
        _change(
            folder / "generation_config.json", lambda values: _add_stop(values, end_of_document)
        )
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(READABLE)


def _add_rope(values: dict[str, Any]) -> None:
    for part in (values, values.get("text_config")):
        rope = part.get("rope_parameters") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(rope, dict):
            continue
        if isinstance(rope.get(FULL), dict):  # Gemma 3: one for each kind of layer
            sliding = rope.get(SLIDING) or {}
            if "rope_theta" in sliding:
                part.setdefault("rope_local_base_freq", sliding["rope_theta"])
            rope = rope[FULL]
        if "rope_theta" in rope:
            part.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            part.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default":
            own = ("rope_theta", "partial_rotary_factor")
            part.setdefault("rope_scaling", {k: v for k, v in rope.items() if k not in own})


def _rename_tokenizer(values: dict[str, Any]) -> None:
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = OLD_CLASS
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):
        del values["extra_special_tokens"]
        values.setdefault("additional_special_tokens", extra)


def _add_stop(values: dict[str, Any], end_of_document: int) -> None:
    stops = end_ids(values.get("eos_token_id"))
    if end_of_document not in stops:
        stops.append(end_of_document)
        values["eos_token_id"] = stops if len(stops) > 1 else stops[0]


def _change(path: Path, change: Any) -> None:
    if not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
