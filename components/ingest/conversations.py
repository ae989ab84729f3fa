"""Cleans conversations: the recipe's filters apply inside turns, and limits to all of it.

`unicode`, `pii` and the filters of packages get each turn's text, and the arguments of tool calls;
`repetition` and `language` get the text of all turns. There is no shortest conversation: an answer
may be one word. Blanks around a turn stay, since a template may need them.
"""

import dataclasses
import functools
import hmac
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from nudge.components.common.chat.conversation import Conversation, Message, checked
from nudge.components.common.chat.lengths import characters, cut_at_turn
from nudge.components.common.chat.refusals import Refusal
from nudge.components.common.readers import Unreadable
from nudge.components.ingest.duplicates import BUCKETS, hash_of, signature, word_hashes
from nudge.components.ingest.filters import Filter, make_filters, tidy
from nudge.components.ingest.settings import IngestSettings

OF_ALL = ("repetition", "language")
"""The filters that get the text of all turns."""
FEW_WORDS = 20
"""In a shorter prompt, one other word makes another question, so only equal ones are twins."""
ROWS = 4
"""Hashes per key of a first user turn: the 28 keys of two turns with a similarity of 0.7 differ in
1 of 2000 pairs, and each pair is checked (`twins`)."""


class Turns(NamedTuple):
    """What decides about a conversation's duplicates and split, each from words without case,
    accents and punctuation: hashes of the user side and of the first user turn, the latter's
    `signature` (empty if it has fewer than `FEW_WORDS` words), and the keyed hash of the first user
    turn in [0, 1)."""

    user_side: int
    first: int
    keys: tuple[int, ...]
    share: float


def cleaned(found: Conversation, settings: IngestSettings) -> Conversation | Unreadable:
    """The conversation with clean turns, cut if it is too long and may be, or why it is dropped."""
    try:
        found = checked(found.with_messages(_turns(found.messages, settings)))
        found = _cut(found, settings)
    except _Dropped as drop:
        return drop.reason
    except Refusal as refusal:
        return Unreadable(refusal.reason, refusal.detail)
    text = found.transcript()
    for apply in _filters(settings)[1]:
        result = apply(text)
        if isinstance(result, Unreadable):
            return result
    return found


class _Dropped(Exception):
    """A filter drops a turn, and with it the conversation."""

    def __init__(self, reason: Unreadable) -> None:
        self.reason = reason


@functools.lru_cache(maxsize=4)
def _filters(settings: IngestSettings) -> tuple[list[Filter], list[Filter]]:
    """The filters for each turn, and those for the text of all turns."""
    names = [name for name in settings.filters if name != "length"]
    of_turns = tuple(name for name in names if name not in OF_ALL)
    of_all = tuple(name for name in names if name in OF_ALL)
    return make_filters(settings, of_turns), make_filters(settings, of_all)


def _turns(messages: Iterable[Message], settings: IngestSettings) -> Iterable[Message]:
    filters = _filters(settings)[0]

    def clean(text: str) -> str:
        text = tidy(text)
        core = text.strip()
        if not core:
            return text
        before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
        for apply in filters:
            result = apply(core)
            if isinstance(result, Unreadable):
                raise _Dropped(result)
            core = result
        return f"{before}{core}{after}"

    for message in messages:
        yield dataclasses.replace(
            message,
            content=clean(message.content),
            reasoning_content=clean(message.reasoning_content),
            tool_calls=tuple(_call(call, clean) for call in message.tool_calls),
        )


def _call(call: Mapping[str, Any], clean: Callable[[str], str]) -> dict[str, Any]:
    function = call["function"]
    arguments = _in_texts(function["arguments"], clean)
    return {**call, "function": {**function, "arguments": arguments}}


def _in_texts(value: Any, clean: Callable[[str], str]) -> Any:
    """A JSON value with every text in it cleaned; keys stay."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {key: _in_texts(each, clean) for key, each in value.items()}
    return [_in_texts(each, clean) for each in value] if isinstance(value, list) else value


def _cut(found: Conversation, settings: IngestSettings) -> Conversation:
    most = settings.max_conversation_characters or settings.max_characters
    return cut_at_turn(found, lambda some: characters(some) <= most, settings.too_long)


def turns_of(found: Conversation, settings: IngestSettings) -> Turns:
    """What decides about the conversation's duplicates and its split."""
    words = word_hashes(found.first_user_turn())
    first = hash_of(words)
    user_side = hash_of(word_hashes(found.user_side()))
    digest = hmac.digest(str(settings.split_seed).encode(), first.to_bytes(8), "sha256")
    keys: tuple[int, ...] = ()
    if settings.near_duplicates and len(words) >= FEW_WORDS:
        keys = tuple(signature(words, ROWS))
    return Turns(user_side, first, keys, int.from_bytes(digest[:8]) / 2**64)


def whole_keys(found: Conversation, settings: IngestSettings) -> tuple[int, ...]:
    """The `signature` of all of a conversation but its system turn, which many may share."""
    if not settings.near_duplicates:
        return (0,) * BUCKETS
    texts = (text for m in found.messages if m.role != "system" for text in m.texts())
    return tuple(signature(word_hashes("\n\n".join(texts))))
