"""Perplexity as ratios of sums over a whole set, scored with a sliding window.

Each document is scored by itself. Its first token is predicted from an end-of-document token, as
in training; a document longer than the window is scored in windows that overlap by
``window - stride`` tokens (https://huggingface.co/docs/transformers/perplexity), each token once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nudge.components.common.language_model import head_weight, hidden_states
from nudge.components.common.progress import Progress
from nudge.kernels import fused_linear_cross_entropy

BATCH_TOKENS = 2048
"""Tokens of one forward pass; windows of like length are scored together."""


@dataclass(frozen=True)
class Score:
    """One document: nats of its tokens under a model, and its tokens, UTF-8 bytes and words."""

    nats: float
    tokens: int
    bytes: int
    words: int


@dataclass(frozen=True)
class Window:
    """Targets ``begin`` to ``end`` of a document, of which those from ``scored_from`` on count."""

    begin: int
    end: int
    scored_from: int


def windows(tokens: int, window: int, stride: int) -> list[Window]:
    """The windows in which ``tokens`` targets are scored, each once, with all context that fits."""
    made = [Window(0, min(tokens, window), 0)] if tokens else []
    while made and made[-1].end < tokens:
        scored_from = made[-1].end
        end = min(scored_from + stride, tokens)
        made.append(Window(max(0, end - window), end, scored_from))
    return made


@torch.no_grad()
def score(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    first_token: int,
    window: int,
    stride: int,
    bar: Progress,
) -> list[Score]:
    """Score every text; ``first_token`` is the id that stands before a document's first token."""
    tokenized = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    jobs = [
        (index, part)
        for index, ids in enumerate(tokenized)
        for part in windows(len(ids), window, min(stride, window))
    ]
    jobs.sort(key=lambda job: job[1].end - job[1].begin)
    nats = [0.0] * len(texts)
    for batch in _batches(jobs):
        length = max(part.end - part.begin for _, part in batch)
        # Padding stands on the right, where causal attention never looks back from.
        inputs = torch.full((len(batch), length), first_token)
        targets = torch.zeros((len(batch), length), dtype=torch.int64)
        counted = torch.zeros((len(batch), length), dtype=torch.bool)
        for row, (index, part) in enumerate(batch):
            ids = torch.tensor([first_token, *tokenized[index]])
            size = part.end - part.begin
            inputs[row, :size] = ids[part.begin : part.end]
            targets[row, :size] = ids[part.begin + 1 : part.end + 1]
            counted[row, part.scored_from - part.begin : size] = True
        losses = _losses(model, inputs, targets)
        sums = (losses * counted).sum(dim=1, dtype=torch.float64)
        for row, (index, part) in enumerate(batch):
            nats[index] += float(sums[row])
            bar.advance(part.end - part.scored_from)
    return [
        Score(nat, len(ids), len(text.encode()), len(text.split()))
        for nat, ids, text in zip(nats, tokenized, texts, strict=True)
    ]


def summarize(scores: Sequence[Score]) -> dict[str, float | int]:
    """Nats per token, token perplexity, bits per byte, word perplexity: ratios of sums."""
    nats = math.fsum(score.nats for score in scores)
    tokens = sum(score.tokens for score in scores)
    count = sum(score.bytes for score in scores)
    words = sum(score.words for score in scores)
    return {
        "nats_per_token": nats / tokens,
        "token_perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / count / math.log(2),
        "word_perplexity": math.exp(nats / words),
        "tokens": tokens,
        "bytes": count,
        "words": words,
        "documents": len(scores),
    }


def _losses(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    hidden = hidden_states(model, inputs, positions)
    losses = fused_linear_cross_entropy(
        hidden.flatten(0, 1),
        head_weight(model),
        targets.flatten(),
        reduction="none",
        logit_softcap=getattr(model.config, "final_logit_softcapping", None) or 0.0,
    )
    return losses.view_as(targets)


def _batches(jobs: list[tuple[int, Window]]) -> list[list[tuple[int, Window]]]:
    batches: list[list[tuple[int, Window]]] = []
    for job in jobs:  # sorted by length, so the newest job sets the width of its batch
        width = job[1].end - job[1].begin
        if not batches or (len(batches[-1]) + 1) * width > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(job)
    return batches
