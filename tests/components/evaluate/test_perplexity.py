"""Windows against literal ones, sums against hand-made ones, scores against plain transformers."""

import math
from pathlib import Path

import pytest
import torch
from nudge.components.common.language_model import load_model, load_tokenizer
from nudge.components.common.progress import progress
from nudge.components.evaluate.perplexity import Score, Window, score, summarize, windows


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
def test_windows_are_the_literal_ones(
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


def test_figures_are_ratios_of_sums_not_means_of_documents() -> None:
    figures = summarize([Score(10.0, 4, 20, 2), Score(2.0, 8, 20, 4)])
    assert figures["nats_per_token"] == pytest.approx(1.0)
    assert figures["token_perplexity"] == pytest.approx(math.e)
    assert figures["bits_per_byte"] == pytest.approx(12 / 40 / math.log(2))
    assert figures["word_perplexity"] == pytest.approx(math.exp(2.0))
    assert (figures["tokens"], figures["bytes"], figures["documents"]) == (12, 40, 2)


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
