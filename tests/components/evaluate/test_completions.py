"""Completions: those of a working model pass, and each kind of broken one fails."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.evaluate.completions import Completion, complete, completion_checks


def completion(text: str, tokens: list[int], finite: bool = True, same: bool = True) -> Completion:
    return Completion("The sky is", text, tokens, finite, same)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (completion(" blue.", [3, 4]), ""),
        (completion(" the the the", [3] * 7), ""),  # too short to tell
        (completion(" a b a b", [3, 4] * 12), ""),
        (completion(" the the the", [3] * 24), "repeats one token in 24 of 24 positions"),
        (completion(" the the x", [3] * 20 + [4] * 4), "repeats one token in 20 of 24"),
        (completion(" the the x", [3] * 19 + [4] * 5), ""),
        (completion("\n \t", [5, 6]), "is empty"),
        (completion("", [0]), "is empty"),
        (completion(" blue", [3, 4], finite=False), "not finite"),
        (completion(" blue", [3, 4], same=False), "gave different texts"),
    ],
)
def test_a_broken_completion_fails(one: Completion, message: str) -> None:
    (check,) = completion_checks([one])
    assert check.ok == (not message)
    assert message in check.message
    assert "The sky is" in check.message


def test_one_character_in_several_tokens_is_a_collapse() -> None:
    (check,) = completion_checks([completion(" eee ee eeee", [5, 6, 7] * 4)])
    assert not check.ok
    assert "repeats one character in 9 of 9 positions" in check.message


def test_a_loop_counts_only_if_the_reference_does_not_loop() -> None:
    loop, fluent = completion(" a b a b", [3, 4] * 12), completion(" blue as", [*range(24)])
    (check,) = completion_checks([loop], [fluent])
    assert not check.ok
    assert "repeats 2 tokens to its end" in check.message
    assert completion_checks([loop], [loop])[0].ok
    assert completion_checks([fluent], [loop])[0].ok


def test_completions_come_with_what_is_said_of_them(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    (one,) = complete(model, tokenizer, ["The Eiffel"], 12, twice=True)
    plain = model.generate(**tokenizer("The Eiffel", return_tensors="pt"), max_new_tokens=12)
    assert one.tokens == plain[0, -len(one.tokens) :].tolist()
    assert one.finite
    assert one.repeatable


BASE_CONFIGURATIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.1},  # as Qwen2.5-0.5B-Instruct has it
    {"stop_strings": ["\n\n", " "]},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"num_return_sequences": 2, "do_sample": True},
    {"num_beams": 3},
    {"cache_implementation": "quantized"},
    {"force_words_ids": [[7]]},
    {"max_time": 0.0},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [5]},
    {"do_sample": True, "temperature": 5.0},
]


@pytest.mark.parametrize("base", BASE_CONFIGURATIONS, ids=lambda base: next(iter(base)))
def test_the_models_generation_configuration_changes_no_completion(
    tiny_model: Path, base: dict[str, Any]
) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    (plain,) = complete(model, tokenizer, ["The Eiffel"], 12)
    assert len(set(plain.tokens)) < len(plain.tokens)  # a penalty would change it
    model.generation_config.update(**base)
    own = model.generation_config
    assert complete(model, tokenizer, ["The Eiffel"], 12) == [plain]
    assert model.generation_config is own


def test_the_models_own_end_tokens_still_end_a_completion(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    (plain,) = complete(model, tokenizer, ["The Eiffel"], 12)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, plain.tokens[0]]
    (ended,) = complete(model, tokenizer, ["The Eiffel"], 12)
    assert ended.tokens == plain.tokens[:1]


def test_a_model_of_no_numbers_is_found_out(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    (check,) = completion_checks(complete(model, tokenizer, ["The Eiffel"], 4))
    assert not check.ok
    assert "not finite" in check.message
