"""Conversations as token ids and learned spans: rendered, shortened, encoded and checked."""

import collections
import datetime
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from nudge.components.common.chat import ChatTemplate, Conversation, Learn, Refusal
from nudge.components.common.chat.lengths import TooLong, cut_at_turn
from nudge.components.common.chat.masks import Encoder, Masked, Plain, rendered
from nudge.components.common.chat.template import Origin
from nudge.components.tokenize.ids import ids_of

EXAMPLES = 5
"""Refused conversations that a report describes, per block of a shard."""


@dataclass(frozen=True)
class Chat:
    """How conversations become text, in plain values that another process can get."""

    template: str
    source: Origin
    named_tokens: tuple[tuple[str, str], ...]
    control_tokens: tuple[str, ...]
    date: datetime.date
    learn: Learn = "assistant"
    max_tokens: int = 0
    too_long: TooLong = "keep_last"
    spelled_out: Literal["text", "refuse"] = "text"

    @classmethod
    def of(cls, template: ChatTemplate, **settings: object) -> "Chat":
        """The values of a template and the settings of `tokenize`."""
        return cls(
            template.text,
            template.source,
            tuple(sorted(template.named_tokens.items())),
            tuple(sorted(template.control_tokens)),
            template.date,
            **settings,  # type: ignore[arg-type]
        )


@dataclass
class Account:
    """What became of conversations: how many were shortened, and refused by reason, with examples
    (document id, source, reason)."""

    shortened: int = 0
    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def refuse(self, document_id: str, source: str, refusal: Refusal) -> None:
        """Count a conversation that cannot be learned from."""
        self.refused[refusal.reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append((document_id, source, str(refusal)))

    def add(self, other: "Account") -> None:
        """Add the counts of another part."""
        self.shortened += other.shortened
        self.refused += other.refused
        self.examples = (self.examples + other.examples)[:EXAMPLES]


class ChatEncoder:
    """Encodes conversations; one per process."""

    def __init__(self, tokenizer: str, chat: Chat, fast: bool) -> None:
        self._chat = chat
        self._template = ChatTemplate(
            chat.template,
            chat.source,
            dict(chat.named_tokens),
            frozenset(chat.control_tokens),
            chat.date,
        )
        self._encoder = Encoder(tokenizer, lambda texts: ids_of(texts, tokenizer, fast))

    def encode(
        self, conversations: Mapping[int, Conversation]
    ) -> dict[int, list[Masked] | Refusal]:
        """The samples of each conversation by its number, or why it has none.

        Its length does not matter here; see `fits` and `shortened`.
        """
        texts: dict[int, list[Plain] | Refusal] = {}
        for number, conversation in conversations.items():
            texts[number] = self._rendered(conversation)
        flat = [text for each in texts.values() if isinstance(each, list) for text in each]
        encoded = iter(self._encoder.encode(flat, self._chat.learn != "all"))
        made: dict[int, list[Masked] | Refusal] = {}
        for number, each in texts.items():
            made[number] = each if isinstance(each, Refusal) else self._checked(each, encoded)
        return made

    def fits(self, samples: list[Masked]) -> bool:
        """Whether each sample has at most ``max_tokens`` + 1 tokens up to its last learned one."""
        most = self._chat.max_tokens
        return not most or max(int(each.learned[-1, 1]) for each in samples) <= most + 1

    def shortened(self, conversation: Conversation) -> list[Masked] | Refusal:
        """The samples of the longest part of a conversation that fits, cut between turns."""

        def fits(part: Conversation) -> bool:
            samples = self.encode({0: part})[0]
            return isinstance(samples, list) and self.fits(samples)

        try:
            part = cut_at_turn(conversation, fits, self._chat.too_long)
        except Refusal as refusal:
            detail = f"more than {self._chat.max_tokens} tokens, {refusal.detail}"
            return Refusal(refusal.reason, detail)
        return self.encode({0: part})[0]

    def _rendered(self, conversation: Conversation) -> list[Plain] | Refusal:
        learn = self._chat.learn
        try:
            if self._chat.spelled_out == "text":
                return rendered(self._template, conversation, learn)
            return [Plain(each) for each in self._template.render(conversation, learn)]
        except Refusal as refusal:
            return refusal

    def _checked(
        self, texts: list[Plain], encoded: Iterator[Masked | Refusal]
    ) -> list[Masked] | Refusal:
        found = [next(encoded) for _ in texts]
        refusals = [one for one in found if isinstance(one, Refusal)]
        return refusals[0] if refusals else [one for one in found if isinstance(one, Masked)]


@functools.lru_cache(maxsize=1)
def encoder_of(tokenizer: str, chat: Chat, fast: bool) -> ChatEncoder:
    """The encoder of this process."""
    return ChatEncoder(tokenizer, chat, fast)


def stacked(samples: list[Masked]) -> tuple[np.ndarray, np.ndarray]:
    """The number of learned spans of each sample, and all spans one after another, uint32."""
    counts = np.array([len(each.learned) for each in samples], np.int64)
    spans = [each.learned for each in samples] or [np.empty((0, 2), np.int64)]
    return counts, np.concatenate(spans).astype(np.uint32)
