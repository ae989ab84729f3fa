"""Perplexity as ratios of sums over a set of documents, scored with a sliding window.

Each document is scored by itself. Its first token is predicted from the token that `first_token_id`
returns. A document longer than the window is scored in windows that overlap by ``window - stride``
tokens (https://huggingface.co/docs/transformers/perplexity), each token once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nudge.components.common.artifacts.evaluation import Metrics
from nudge.components.common.artifacts.scores import Score
from nudge.components.common.chat import Conversation
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.progress import Progress
from nudge.components.common.core.scripts import separates_words
from nudge.components.common.models.end_of_document import document_start_id, end_of_document_id
from nudge.components.common.models.language_model import check_loss, hidden_states, next_token_loss
from nudge.components.evaluate.chats import Scorer, assistant_text
from nudge.components.evaluate.ranks import Ranks

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one forward pass; windows of similar length are scored together."""


@dataclass(frozen=True)
class Window:
    """Targets ``begin`` to ``end`` of a document; those from ``scored_from`` on are scored."""

    begin: int
    end: int
    scored_from: int


def windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Windows that score each of ``tokens`` targets once, with as much context as fits."""
    made = [Window(0, min(tokens, window), 0)] if tokens else []
    while made and made[-1].end < tokens:
        scored_from = made[-1].end
        end = min(scored_from + stride, tokens)
        made.append(Window(max(0, end - window), end, scored_from))
    return made


def first_token_id(tokenizer: Any, setting: str) -> int | None:
    """The id of the token before a document's first token, or None for nothing.

    ``bos`` and ``end`` are the tokenizer's BOS and end-of-document tokens; ``auto`` is the
    one that training uses (`document_start_id`). Raises `UserError` if the tokenizer lacks the
    token.
    """
    if setting == "none":
        return None
    if setting == "auto":
        return document_start_id(tokenizer)
    if setting == "end":
        return end_of_document_id(tokenizer)
    if tokenizer.bos_token_id is None:
        raise UserError(
            "evaluate.first_token = 'bos': the tokenizer has no BOS token; use end or auto"
        )
    return int(tokenizer.bos_token_id)


@torch.no_grad()
def score(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str | Conversation],
    *,
    first_token: int | None,
    window: int,
    stride: int,
    bar: Progress,
    batch_tokens: int = 0,
    scorer: Scorer | None = None,
    ranks: Ranks | None = None,
) -> list[Score]:
    """Score every text; ``first_token`` is the id of the token before a document's first token.

    Without it, a document's first token is only context: it adds no nats and does not count as a
    token, but its bytes count. ``scorer`` encodes conversations. Only their learned tokens are
    scored, and their bytes and words are those of the assistant turns.

    ``batch_tokens`` 0 means `BATCH_TOKENS` of the model's device. Each of several ``ranks`` scores
    its share of the batches, and all return the same scores. Raises `UserError` for a model
    whose loss is not that of its own logits.
    """
    ranks = ranks or Ranks()
    check_loss(model)
    most = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
    before = [] if first_token is None else [first_token]
    tokenized: list[tuple[list[int], np.ndarray]] = []
    owners: list[int] = []
    for index, text in enumerate(texts):
        for sample in _samples(text, tokenizer, before, scorer):
            tokenized.append(sample)
            owners.append(index)
    jobs = [
        (index, part)
        for index, (ids, scored) in enumerate(tokenized)
        for part in windows(max(0, len(ids) - 1), window, min(stride, window))
        if scored[part.scored_from : part.end].any()
    ]
    jobs.sort(key=lambda job: job[1].end - job[1].begin)
    nats = [0.0] * len(texts)
    batches = _batches(jobs, most)
    for start in range(0, len(batches), ranks.world):
        together = batches[start : start + ranks.world]
        # Every rank must run the model, so one without a batch repeats the last and ignores it.
        batch = together[min(ranks.rank, len(together) - 1)]
        losses = _batch_losses(model, tokenized, batch)
        if ranks.rank < len(together):
            for (index, _), of_window in zip(batch, losses, strict=True):
                nats[owners[index]] += float(of_window.sum())
        bar.advance(sum(part.end - part.scored_from for each in together for _, part in each))
    nats = ranks.summed(nats)
    tokens = [0] * len(texts)
    for owner, (_, scored) in zip(owners, tokenized, strict=True):
        tokens[owner] += int(scored.sum())
    plain = [text if isinstance(text, str) else assistant_text(text) for text in texts]
    return [
        Score(nat, count, len(text.encode()), _words(text))
        for nat, count, text in zip(nats, tokens, plain, strict=True)
    ]


def _samples(
    text: str | Conversation, tokenizer: Any, before: list[int], scorer: Scorer | None
) -> list[tuple[list[int], np.ndarray]]:
    """The ids to score, and for each token after the first whether it is; bool [ids - 1]."""
    if isinstance(text, str):
        ids = before + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [(ids, np.ones(max(0, len(ids) - 1), np.bool_))]
    assert scorer is not None
    found = []
    for masked in scorer.samples(text):
        scored = np.zeros(len(masked.ids) - 1, np.bool_)
        for first, last in masked.learned.tolist():
            # Nothing precedes the first token, so it is only context.
            scored[max(first - 1, 0) : last - 1] = True
        found.append((masked.ids.tolist(), scored))
    return found


def summarize(scores: Sequence[Score]) -> Metrics:
    """Nats per token, token perplexity, bits per byte, word perplexity: ratios of sums.

    A perplexity that no float holds is infinite. Without words, as in scripts that put no spaces
    between them, there is no word perplexity.
    """
    nats = math.fsum(score.nats for score in scores)
    tokens = sum(score.tokens for score in scores)
    count = sum(score.bytes for score in scores)
    words = sum(score.words for score in scores) if all(score.words for score in scores) else None
    if not tokens:
        raise UserError(
            f"the {len(scores)} documents to score have 0 tokens that can be scored; add more or "
            "longer texts"
        )
    return Metrics(
        nats_per_token=nats / tokens,
        token_perplexity=_exp(nats / tokens),
        bits_per_byte=nats / count / math.log(2),
        word_perplexity=_exp(nats / words) if words else None,
        tokens=tokens,
        bytes=count,
        words=words,
        documents=len(scores),
    )


def _words(text: str) -> int:
    """The number of words, or 0 if nothing separates them."""
    return len(text.split()) if separates_words(text) else 0


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _batch_losses(
    model: Any, tokenized: list[tuple[list[int], np.ndarray]], batch: list[tuple[int, Window]]
) -> Sequence[torch.Tensor]:
    """The losses of the scored tokens of each window, in float64 on the CPU."""
    length = max(part.end - part.begin for _, part in batch)
    # Padding is on the right, so causal attention never sees it.
    inputs = torch.zeros((len(batch), length), dtype=torch.int64)
    targets = torch.zeros((len(batch), length), dtype=torch.int64)
    counted = torch.zeros((len(batch), length), dtype=torch.bool)
    for row, (index, part) in enumerate(batch):
        of_document, scored = tokenized[index]
        ids = torch.tensor(of_document[part.begin : part.end + 1])
        size = part.end - part.begin
        inputs[row, :size] = ids[:-1]
        targets[row, :size] = ids[1:]
        chosen = torch.from_numpy(scored[part.scored_from : part.end])
        counted[row, part.scored_from - part.begin : size] = chosen
    losses = _losses(model, inputs, targets, counted).cpu().double()
    parts: Sequence[torch.Tensor] = losses.split(counted.sum(1).tolist())
    return parts


def _losses(
    model: Any, inputs: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """The losses of the counted targets, row by row; the head skips the others."""
    device = model.device
    positions = torch.arange(inputs.shape[1], device=device).expand_as(inputs)
    hidden = hidden_states(model, inputs.to(device), positions)
    counted = counted.to(device)
    return next_token_loss(model, hidden[counted], targets.to(device)[counted], "none")


def _batches(jobs: list[tuple[int, Window]], most: int) -> list[list[tuple[int, Window]]]:
    batches: list[list[tuple[int, Window]]] = []
    for job in jobs:  # sorted by length, so the newest job sets the width of its batch
        width = job[1].end - job[1].begin
        if not batches or (len(batches[-1]) + 1) * width > most:
            batches.append([])
        batches[-1].append(job)
    return batches
