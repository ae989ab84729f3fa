"""Shortens a conversation that is too long by leaving out turns, never a part of one."""

import bisect
from collections.abc import Callable
from typing import Literal

from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.chat.refusals import Refusal

TooLong = Literal["drop", "keep_first", "keep_last"]


def characters(found: Conversation) -> int:
    """The length of all turns."""
    return sum(len(part) for message in found.messages for part in message.texts())


def cut_at_turn(
    found: Conversation, fits: Callable[[Conversation], bool], too_long: TooLong
) -> Conversation:
    """The longest part of a conversation that ``fits``, or all of it.

    ``too_long`` is ``keep_first`` to cut turns from the end, ``keep_last`` to cut them from the
    beginning, or ``drop``. The system turn stays; the rest begins with a user turn and ends with an
    answer. Whatever fits must also fit without some of its turns. Raises `Refusal`
    (``conversation_too_long``) if nothing may be cut or not even one exchange fits.
    """
    if fits(found):
        return found
    if too_long != "drop":
        messages = found.messages
        system = messages[:1] if messages[0].role == "system" else ()
        rest = messages[len(system) :]
        starts = [n for n, message in enumerate(rest) if message.role == "user"][1:]
        parts = [rest[n:] for n in starts]
        if too_long == "keep_first":
            parts = [rest[:n] for n in reversed(starts)]
        shorter = [found.with_messages((*system, *part)) for part in parts]
        if (first := bisect.bisect_left(shorter, True, key=fits)) < len(shorter):
            return shorter[first]
    detail = f"{characters(found)} characters in {len(found.messages)} turns"
    raise Refusal("conversation_too_long", detail)
