"""Completions: those of a working model pass, and each kind of broken one fails."""

from pathlib import Path

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


def test_completions_come_with_what_is_said_of_them(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    (one,) = complete(model, tokenizer, ["The Eiffel"], 12, twice=True)
    plain = model.generate(**tokenizer("The Eiffel", return_tensors="pt"), max_new_tokens=12)
    assert one.tokens == plain[0, -len(one.tokens) :].tolist()
    assert one.finite
    assert one.repeatable


def test_a_model_of_no_numbers_is_found_out(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    (check,) = completion_checks(complete(model, tokenizer, ["The Eiffel"], 4))
    assert not check.ok
    assert "not finite" in check.message
