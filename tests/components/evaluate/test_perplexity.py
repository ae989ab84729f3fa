"""Compare windows with literal ones, sums with manual ones, scores with plain transformers."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import processors

from nudge.components.common.artifacts.scores import Score
from nudge.components.common.chat.masks import Masked
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.progress import progress
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.evaluate import perplexity
from nudge.components.evaluate.perplexity import (
    Window,
    first_token_id,
    score,
    summarize,
    windows,
)
from nudge.components.tokenize.ids import ids_of, text_ids


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "expected"),
    [
        (0, 4, 2, []),
        (3, 4, 2, [Window(0, 3, 0)]),
        (4, 4, 2, [Window(0, 4, 0)]),
        (5, 4, 2, [Window(0, 4, 0), Window(1, 5, 4)]),
        (9, 4, 2, [Window(0, 4, 0), Window(2, 6, 4), Window(4, 8, 6), Window(5, 9, 8)]),
        (8, 4, 4, [Window(0, 4, 0), Window(4, 8, 4)]),
    ],
)
def test_windows_equal_the_literal_ones(
    tokens: int, window: int, stride: int, expected: list[Window]
) -> None:
    assert windows(tokens, window, stride) == expected


def test_every_token_is_scored_once() -> None:
    for tokens in range(1, 60):
        for window in range(1, 12):
            for stride in range(1, window + 1):
                scored = [
                    index
                    for part in windows(tokens, window, stride)
                    for index in range(part.scored_from, part.end)
                ]
                assert scored == list(range(tokens))


def test_metrics_are_ratios_of_sums_rather_than_means_of_documents() -> None:
    figures = summarize([Score(10.0, 4, 20, 2), Score(2.0, 8, 20, 4)])
    assert figures.nats_per_token == pytest.approx(1.0)
    assert figures.token_perplexity == pytest.approx(math.e)
    assert figures.bits_per_byte == pytest.approx(12 / 40 / math.log(2))
    assert figures.word_perplexity == pytest.approx(math.exp(2.0))
    assert (figures.tokens, figures.bytes, figures.documents) == (12, 40, 2)


def test_scores_equal_plain_transformers(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    texts = ["Paris is on the Seine.", "A second, rather longer text about nothing at all.", "x"]
    with progress("test") as bar:
        scores = score(model, tokenizer, texts, first_token=0, window=16, stride=5, bar=bar)
    for text, scored in zip(texts, scores, strict=True):
        ids = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        nats = 0.0
        for part in windows(len(ids) - 1, 16, 5):
            logits = model(torch.tensor([ids[part.begin : part.end]])).logits[0]
            for index in range(part.scored_from, part.end):
                row = torch.log_softmax(logits[index - part.begin].double(), dim=-1)
                nats -= row[ids[index + 1]].item()
        assert scored.nats == pytest.approx(nats, rel=1e-5)
        assert scored.tokens == len(ids) - 1
        assert scored.bytes == len(text.encode())


def test_control_tokens_that_a_text_spells_out_are_scored_as_text(tiny_model: Path) -> None:
    """As `tokenize` encodes them, so that training and evaluation see the same tokens."""
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    text = "One <|im_end|> two."
    of_tokenizer = (tiny_model / "tokenizer.json").read_text(encoding="utf-8")
    options: dict[str, Any] = {"first_token": 0, "window": 64, "stride": 32}
    with progress("test") as bar:
        found = {
            is_text: score(model, tokenizer, [text], bar=bar, is_control_text=is_text, **options)[
                0
            ].tokens
            for is_text in (True, False)
        }
    assert found[True] == len(text_ids([text], of_tokenizer, False)[0])
    assert found[False] == len(ids_of([text], of_tokenizer, False)[0]) < found[True]


def test_a_model_with_another_loss_is_not_scored(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with progress("test") as bar, pytest.raises(UserError, match="choose another architecture"):
        score(model, tokenizer, ["text"], first_token=0, window=16, stride=5, bar=bar)


def with_bos(folder: Path, name: str) -> Any:
    """The tiny tokenizer, changed to put its BOS before a text like those of Gemma and Llama 3."""
    tokenizer = load_tokenizer(folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, tokenizer.convert_tokens_to_ids(name))]
    )
    return tokenizer


def test_the_first_token_follows_the_tokenizer(tiny_model: Path) -> None:
    plain, bos = load_tokenizer(tiny_model), with_bos(tiny_model, "<|im_start|>")
    named = plain.convert_tokens_to_ids
    assert first_token_id(plain, "auto") == named("<|endoftext|>")
    assert first_token_id(bos, "auto") == named("<|im_start|>")
    assert first_token_id(plain, "bos") == named("<|im_start|>")
    assert first_token_id(bos, "end") == named("<|endoftext|>")
    assert first_token_id(bos, "none") is None
    # Another token in front does not imply that BOS belongs there.
    assert first_token_id(with_bos(tiny_model, "<|im_end|>"), "auto") == named("<|endoftext|>")


def test_a_tokenizer_without_such_tokens(tiny_model: Path) -> None:
    bare = load_tokenizer(tiny_model)
    bare.bos_token = bare.eos_token = None
    assert first_token_id(bare, "end") == 0  # <|endoftext|>
    with pytest.raises(UserError, match="has no BOS token; use end or auto"):
        first_token_id(bare, "bos")


@pytest.mark.parametrize(
    ("first", "inputs", "targets"),
    [
        (7, [[7, 20, 21, 22], [20, 21, 22, 23]], [[20, 21, 22, 23], [24]]),
        (None, [[20, 21, 22, 23]], [[21, 22, 23, 24]]),
    ],
)
def test_the_literal_windows_of_a_document(
    monkeypatch: pytest.MonkeyPatch,
    first: int | None,
    inputs: list[list[int]],
    targets: list[list[int]],
) -> None:
    """A document of the tokens 20 to 24, in windows of 4 that move by 2."""
    seen: list[tuple[list[int], list[int]]] = []

    def losses(model: Any, rows: Any, wanted: Any, counted: Any) -> torch.Tensor:
        for row, of_row, counts in zip(rows, wanted, counted, strict=True):
            seen.append((row.tolist(), of_row[counts].tolist()))
        return torch.ones(int(counted.sum()))

    monkeypatch.setattr(perplexity, "_losses", losses)
    monkeypatch.setattr(perplexity, "check_loss", lambda model: None)
    model = SimpleNamespace(device=torch.device("cpu"))

    class Tokenizer:
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [20, 21, 22, 23, 24]}

    with progress("test") as bar:
        (scored,) = score(
            model, Tokenizer(), ["text"], first_token=first, window=4, stride=2, bar=bar
        )
    assert seen == list(zip(inputs, targets, strict=True))
    assert scored == Score(float(scored.tokens), 5 if first == 7 else 4, 4, 1)


def test_a_perplexity_that_no_float_holds_is_infinite() -> None:
    """A document that is one long word of 900 nats."""
    figures = summarize([Score(900.0, 300, 1200, 1)])
    assert figures.word_perplexity == math.inf
    assert figures.token_perplexity == pytest.approx(math.exp(3.0))
    assert figures.bits_per_byte == pytest.approx(900 / 1200 / math.log(2))


def test_too_little_text_to_score_is_an_error() -> None:
    with pytest.raises(UserError, match="the 1 documents to score have 0 tokens"):
        summarize([Score(0.0, 0, 1, 1)])


def test_words_without_spaces_have_no_perplexity() -> None:
    figures = summarize([Score(90.0, 30, 120, 20), Score(90.0, 30, 120, 0)])
    assert (figures.words, figures.word_perplexity) == (None, None)
    assert figures.token_perplexity == pytest.approx(math.exp(3.0))


def test_the_first_token_of_a_conversation_is_only_context() -> None:
    """Also if it is learned, as in a template that puts nothing before a first assistant turn."""
    found = [Masked(np.array([5, 6, 7, 8]), np.array([[0, 2], [3, 4]]))]
    scorer: Any = SimpleNamespace(samples=lambda _: found)
    conversation: Any = None
    ((ids, scored),) = perplexity._samples(conversation, None, [], scorer, True)
    assert ids == [5, 6, 7, 8]
    assert scored.tolist() == [True, False, True]
