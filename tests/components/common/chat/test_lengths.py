"""Cutting a conversation at a turn."""

import pytest

from nudge.components.common.chat import Refusal, conversation_of
from nudge.components.common.chat.lengths import TooLong, characters, cut_at_turn

TOOL = {"function": {"name": "add", "arguments": {}}}
FOUND = conversation_of(
    {
        "messages": [
            {"role": "system", "content": "s" * 10},
            {"role": "user", "content": "a" * 10},
            {"role": "assistant", "content": "b" * 10},
            {"role": "user", "content": "c" * 10},
            {"role": "assistant", "content": "", "tool_calls": [TOOL]},
            {"role": "tool", "content": "d" * 10},
            {"role": "assistant", "content": "e" * 10},
            {"role": "user", "content": "f" * 10},
            {"role": "assistant", "content": "g" * 10},
        ]
    }
)
CALL = characters(FOUND) - 80


@pytest.mark.parametrize(
    ("most", "too_long", "kept"),
    [
        (1000, "drop", "sabcdefg"),
        (79 + CALL, "keep_first", "sabcde"),
        (60 + CALL, "keep_first", "sabcde"),
        (59 + CALL, "keep_first", "sab"),
        (79 + CALL, "keep_last", "scdefg"),
        (59 + CALL, "keep_last", "sfg"),
        (29, "keep_last", ""),
        (79 + CALL, "drop", ""),
    ],
)
def test_whole_exchanges_are_left_out(most: int, too_long: TooLong, kept: str) -> None:
    if kept:
        found = cut_at_turn(FOUND, lambda some: characters(some) <= most, too_long)
        assert "".join(m.content[:1] for m in found.messages) == kept
        assert all(len(m.content) in (0, 10) for m in found.messages)
        return
    with pytest.raises(Refusal) as refusal:
        cut_at_turn(FOUND, lambda some: characters(some) <= most, too_long)
    assert refusal.value.reason == "conversation_too_long"
