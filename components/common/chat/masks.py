"""Token ids of rendered conversations, and which of them are learned.

A token is learned if it begins inside a learned range of characters. A tokenizer whose tokens are
bytes of the text shows where each one begins; for others the tokenizer's own offsets do. With such
a byte-level tokenizer the text is also cut where an answer begins, because a served model continues
from the tokens of the prompt: no token then covers the end of the prompt and the start of the
answer.

Control tokens that the template writes become their ids. Where a turn spells one out, its text
stays text: `hidden` marks it before rendering, and `Encoder` encodes it without special tokens.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.chat.refusals import Refusal
from nudge.components.common.chat.render import Learn, Rendered
from nudge.components.common.chat.template import ChatTemplate

IdsOf = Callable[[list[str]], list[np.ndarray]]
PRIVATE = range(0xE001, 0xF8FF)
"""Characters without a meaning; the first that a conversation lacks marks a spelled-out token."""


@dataclass(frozen=True)
class Masked:
    """Ids, int64 [tokens], and the learned spans of tokens, int64 [spans, 2], in order and apart.

    The first token is never learned, since nothing precedes it.
    """

    ids: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class Plain:
    """A rendered text, and the ranges of it that spell out a control token and stay text."""

    rendered: Rendered
    literal: tuple[tuple[int, int], ...] = ()


def hidden(
    conversation: Conversation, control: re.Pattern[str]
) -> tuple[Conversation, Callable[[Rendered], Plain]]:
    """The conversation with a mark inside each spelled-out control token, so that a template can
    render it, and a function that removes the marks from what was rendered."""
    text = conversation.to_json()
    if not any(control.search(each) for m in conversation.messages for each in m.texts()):
        return conversation, Plain
    mark = next(chr(code) for code in PRIVATE if chr(code) not in text)

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return control.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", value)
        if isinstance(value, dict):
            return {key: marked(each) for key, each in value.items()}
        return [marked(each) for each in value] if isinstance(value, list | tuple) else value

    messages = [
        dataclasses.replace(
            message,
            content=marked(message.content),
            reasoning_content=marked(message.reasoning_content),
            tool_calls=tuple(marked(list(message.tool_calls))),
        )
        for message in conversation.messages
    ]

    def cleared(rendered: Rendered) -> Plain:
        parts = rendered.text.split(mark)
        text = "".join(parts)
        ends = np.cumsum([len(part) for part in parts[:-1]]).tolist()
        matches = [control.match(text, end - 1) for end in ends]
        literal = tuple(match.span() for match in matches if match)
        marks = [end + number for number, end in enumerate(ends)]  # in the rendered text

        def moved(at: int) -> int:
            return at - int(np.searchsorted(marks, at))

        learned = tuple((moved(first), moved(last)) for first, last in rendered.learned)
        return Plain(Rendered(text, learned), literal)

    return conversation.with_messages(messages), cleared


def rendered(
    template: ChatTemplate, conversation: Conversation, learn: Learn = "assistant"
) -> list[Plain]:
    """The texts that teach a conversation (see `ChatTemplate.render`). A control token that a turn
    spells out stays text. Raises `Refusal` as `ChatTemplate.render` does."""
    conversation, cleared = hidden(conversation, template.control)
    return [cleared(each) for each in template.render(conversation, learn)]


class Encoder:
    """Encodes rendered conversations with the text of a ``tokenizer.json``.

    ``ids_of`` gives the ids of texts, without special tokens around them.
    """

    def __init__(self, tokenizer: str, ids_of: IdsOf) -> None:
        values = json.loads(tokenizer)
        self._ids_of = ids_of
        self._exact = Tokenizer.from_str(tokenizer)
        self._literal = Tokenizer.from_str(tokenizer)
        self._literal.encode_special_tokens = True
        for each in (self._exact, self._literal):
            each.no_truncation()
            each.no_padding()
        special = [each for each in values.get("added_tokens", []) if each.get("special")]
        self._control_ids = np.array([each["id"] for each in special], np.int64)
        self._bytes = _byte_lengths(values)

    def encode(self, texts: Sequence[Plain], ends_turn: bool = True) -> list[Masked | Refusal]:
        """Each text as ids and learned spans; a `Refusal` for one without a learned token or, with
        ``ends_turn``, with a span that does not end with a control token."""
        cuts = [self._cuts(text) for text in texts]
        pieces = [
            text.rendered.text[first:last]
            for text, ends in zip(texts, cuts, strict=True)
            for first, last in itertools.pairwise(ends)
        ]
        encoded = iter(self._ids_of(pieces))
        made: list[Masked | Refusal] = []
        for text, ends in zip(texts, cuts, strict=True):
            own = [next(encoded).astype(np.int64) for _ in ends[1:]]
            made.append(self._masked(text, ends, own, ends_turn))
        return made

    def _cuts(self, text: Plain) -> list[int]:
        """Where a text is cut: at spelled-out control tokens and, if every token is a run of bytes,
        where an answer begins."""
        cuts = {0, len(text.rendered.text), *(at for span in text.literal for at in span)}
        if self._bytes is not None:
            cuts.update(first for first, _ in text.rendered.learned)
        return sorted(cuts)

    def _masked(
        self, text: Plain, ends: list[int], found: list[np.ndarray], ends_turn: bool
    ) -> Masked | Refusal:
        full, literal = text.rendered.text, {first for first, _ in text.literal}
        ids: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        for (first, last), own in zip(itertools.pairwise(ends), found, strict=True):
            piece = full[first:last]
            if first in literal:
                own, inside = self._as_text(piece)
                starts.append(first + inside)
            elif (at := self._byte_starts(piece, own)) is not None:
                starts.append(first + at)
            else:
                encoding = self._exact.encode(piece, add_special_tokens=False)
                own = np.array(encoding.ids, np.int64)
                starts.append(first + np.array([at for at, _ in encoding.offsets], np.int64))
            ids.append(own)
        joined, at = np.concatenate(ids), np.concatenate(starts)
        control = self._control_ids if ends_turn else None
        return _spans(text.rendered, joined, at, control)

    def _as_text(self, piece: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a spelled-out control token as text, and the character of each."""
        encoding = self._literal.encode(piece, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        if len(piece) > 1 and np.isin(ids, self._control_ids).any():
            # Unigram and WordLevel have control tokens in their vocabulary too. No part spells one
            # out, because the piece is cut after its first character.
            (start, at), (rest, after) = self._as_text(piece[:1]), self._as_text(piece[1:])
            return np.concatenate([start, rest]), np.concatenate([at, 1 + after])
        return ids, np.array([at for at, _ in encoding.offsets], np.int64)

    def _byte_starts(self, piece: str, ids: np.ndarray) -> np.ndarray | None:
        """The character at which each token begins; None unless the tokens' bytes are the text."""
        if self._bytes is None:
            return None
        lengths = self._bytes[ids]
        stops = np.cumsum(lengths)
        data = piece.encode()
        if len(ids) and (stops[-1] != len(data) or (lengths == 0).any()):
            return None
        starts = stops - lengths
        if len(data) == len(piece):
            return starts
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # the first byte of a character
        return (np.cumsum(begins) - 1)[starts]


def _spans(
    rendered: Rendered, ids: np.ndarray, starts: np.ndarray, control: np.ndarray | None
) -> Masked | Refusal:
    """The learned spans of tokens; a `Refusal` if one is empty or does not end with one of the
    ``control`` tokens."""
    spans: list[tuple[int, int]] = []
    for first, last in rendered.learned:
        begin, end = np.searchsorted(starts, [first, last]).tolist()
        if begin == end:
            return Refusal("nothing_learned", f"no token begins in {rendered.text[first:last]!r}")
        if control is not None and ids[end - 1] not in control:
            tail = rendered.text[first:last][-40:]
            return Refusal("no_end_of_turn", f"its last token is no control token: {tail!r}")
        begin = max(begin, 1)
        if spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], end)
        elif begin < end:
            spans.append((begin, end))
    if not spans:
        return Refusal("nothing_learned", "its only learned token is the first one")
    return Masked(ids, np.array(spans, np.int64))


def _byte_lengths(values: dict[str, Any]) -> np.ndarray | None:
    """The number of bytes of each token by its id; None unless the tokenizer is byte-level.

    In a byte-level vocabulary each character stands for one byte. 0 stands for an unknown id.
    """
    if values.get("model", {}).get("type") != "BPE" or '"ByteLevel"' not in json.dumps(
        values.get("decoder")
    ):
        return None
    lengths = {index: len(token) for token, index in values["model"]["vocab"].items()}
    lengths |= {each["id"]: len(each["content"].encode()) for each in values["added_tokens"]}
    table = np.zeros(max(lengths) + 1, np.int64)
    table[np.fromiter(lengths, np.int64)] = np.fromiter(lengths.values(), np.int64)
    return table
