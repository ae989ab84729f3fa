"""An exported folder is read the same by transformers 4.57 and 5, and by other users."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from nudge.components.common.models.language_model import load_model
from nudge.components.train.output.card import model_card
from nudge.components.train.output.export import finish_export

ROPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
    (
        {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    ),
    (
        {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    (
        {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
]


@pytest.mark.parametrize(("rope", "older"), ROPES)
def test_older_releases_find_the_positions_where_they_look(
    rope: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"rope_parameters": rope}))
    finish_export(tmp_path, None)
    assert json.loads(path.read_text()) == {"rope_parameters": rope, **older}
    path.write_text(json.dumps({"text_config": {"rope_parameters": rope}}))
    finish_export(tmp_path, None)
    assert json.loads(path.read_text())["text_config"] == {"rope_parameters": rope, **older}


def test_the_finished_folder_is_the_same_model(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "model"
    model, tokenizer = load_model(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    model.config.rope_parameters = {"rope_theta": 777.0, "rope_type": "default"}
    model.save_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o600)
    before = AutoConfig.from_pretrained(folder)
    ids = torch.arange(12)[None]
    logits = load_model(folder)(ids).logits
    finish_export(folder, 0)
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044
    values = json.loads((folder / "config.json").read_text())
    assert values["rope_theta"] == 777.0
    assert AutoConfig.from_pretrained(folder).rope_parameters == before.rope_parameters
    assert torch.equal(load_model(folder)(ids).logits, logits)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(saved.get("extra_special_tokens"), list)
    other = AutoTokenizer.from_pretrained(folder)
    text = "The Eiffel<|tool|> Tower<|im_end|>"
    assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert "<|tool|>" in other.all_special_tokens
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("stops", "after"), [(None, 7), (2, [2, 7]), ([2, 3], [2, 3, 7]), (7, 7), ([2, 7], [2, 7])]
)
def test_the_end_of_a_document_is_among_the_stops(stops: Any, after: Any, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"repetition_penalty": 1.1, "eos_token_id": stops}))
    finish_export(tmp_path, 7)
    assert json.loads(path.read_text()) == {"repetition_penalty": 1.1, "eos_token_id": after}


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("hf://owner/tower@v1", "base_model: owner/tower\n"),
        ("s3://bucket/models/tower", ""),
        ("/models/tower", ""),
    ],
)
def test_the_card_names_the_base_by_its_hub_name_only(uri: str, line: str) -> None:
    facts: dict[str, Any] = {
        "base_model": {"uri": uri, "sha256": "a"},
        "training": {
            **dict.fromkeys(("mode", "steps", "tokens", "trainable_parameters", "parameters"), 1)
        },
        "settings": {},
        **dict.fromkeys(("data_fingerprint", "tokenizer_sha256", "code_version", "seed"), "x"),
    }
    header = model_card(facts).split("---\n")[1]
    assert [each for each in header.splitlines(True) if "base_model" in each] == [line] * bool(line)
    assert "tags: [nudge]\n" in header
