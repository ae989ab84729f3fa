"""Every form in which people store conversations, and every reason to refuse one."""

import json
from typing import Any

import pytest

from nudge.components.common.chat import REASONS, Refusal, conversation_of
from nudge.components.common.chat.forms import chat_columns, is_conversation

QUESTION, ANSWER = "Where is the Eiffel Tower?", "In Paris."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SYSTEM = {"role": "system", "content": "Be brief."}

FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "JSON text": {"messages": json.dumps(TURNS)},
    "Python text": {"messages": repr(TURNS)},
    "parts": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Where is "}, {"text": QUESTION[9:]}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    },
    "instruction": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "Dolly": {"instruction": QUESTION, "context": None, "response": ANSWER},
    "prompt": {"prompt": QUESTION, "completion": f" {ANSWER}\n"},
    "prompt of messages": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "question": {"Question": QUESTION, "Answer ": ANSWER},
    "ends with a question": {"messages": [*TURNS, {"role": "user", "content": "And then?"}]},
    "nulls": {
        "messages": [{**turn, "tool_calls": None, "name": None} for turn in TURNS],
        "tools": None,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_conversation(form: str) -> None:
    row = FORMS[form]
    assert conversation_of(row).plain() == {"messages": TURNS}
    assert is_conversation(row)
    assert chat_columns([*row, "text", "id"]) == list(row)


def test_system_prompts_and_inputs() -> None:
    row = {"system": "Be brief.", "instruction": "Translate.", "input": "Turm", "output": "tower"}
    assert [(m.role, m.content) for m in conversation_of(row).messages] == [
        ("system", "Be brief."),
        ("user", "Translate.\n\nTurm"),
        ("assistant", "tower"),
    ]
    turns = [{"from": "system", "value": "Be brief."}, *FORMS["ShareGPT"]["conversations"]]
    assert conversation_of({"conversations": turns}).messages[0].role == "system"
    history = {"history": [["Hello", "Hi!"]], "instruction": QUESTION, "output": ANSWER}
    assert [m.content for m in conversation_of(history).messages] == [
        "Hello",
        "Hi!",
        QUESTION,
        ANSWER,
    ]


def test_tool_calls_of_each_form_are_the_same() -> None:
    inner = {"name": "weather", "arguments": {"city": "Rome"}}
    as_text = {"name": "weather", "arguments": json.dumps(inner["arguments"])}
    rows = [
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "rain"},
                TURNS[1],
            ]
        }
        for call in (inner, {"function": inner}, {"type": "function", "function": as_text})
    ]
    rows.append(
        {
            "conversations": [
                {"from": "human", "value": QUESTION},
                {"from": "function_call", "value": json.dumps(inner)},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": ANSWER},
            ]
        }
    )
    first, *others = [conversation_of(row) for row in rows]
    assert first.messages[1].tool_calls == ({"type": "function", "function": inner},)
    assert all(other == first for other in others)


def test_what_is_learned_of_each_turn() -> None:
    for key, value in (("weight", 0), ("weight", 0.0), ("train", False), ("train", "false")):
        made = conversation_of({"messages": [*TURNS, TURNS[0], {**TURNS[1], key: value}]})
        assert [m.learn for m in made.messages] == [True, True, True, False]
    assert conversation_of({"messages": [TURNS[0], {**TURNS[1], "weight": 1}]}).messages[1].learn


REFUSED: dict[str, dict[str, Any]] = {
    "not_a_conversation": {"title": "Paris", "body": "A city."},
    "bad_messages": {"messages": "not a list"},
    "no_messages": {"messages": []},
    "bad_message": {"messages": ["Hello", "Hi"]},
    "unknown_role": {"messages": [TURNS[0], {"role": "critic", "content": "Hm."}]},
    "content_not_text": {
        "messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]
    },
    "bad_tool_call": {
        "messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"function": {}}]}]
    },
    "bad_tools": {"messages": TURNS, "tools": "[1"},
    "bad_weight": {"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]},
    "no_assistant_turn": {"messages": TURNS[:1]},
    "two_system_turns": {"messages": [SYSTEM, SYSTEM, *TURNS]},
    "role_order": {"messages": [TURNS[0], *TURNS]},
    "empty_prompt": {"instruction": " ", "input": "", "output": ANSWER},
    "empty_answer": {"question": QUESTION, "answer": "  "},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_conversation_that_cannot_be_learned_has_a_reason(reason: str) -> None:
    with pytest.raises(Refusal) as refusal:
        conversation_of(REFUSED[reason])
    assert refusal.value.reason == reason
    assert REASONS[reason] in str(refusal.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TURNS[::-1] + TURNS[1:]}, "role_order"),
        ({"messages": [TURNS[0], SYSTEM, *TURNS]}, "role_order"),
        ({"messages": [TURNS[0], {"role": "tool", "content": "rain"}, TURNS[1]]}, "role_order"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "empty_answer"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 7}]}, "content_not_text"),
        ({"messages": [TURNS[0], {"role": 7, "content": "x"}]}, "bad_message"),
        ({"messages": {"role": "user"}}, "bad_messages"),
        ({"messages": "[" * 5000}, "bad_messages"),
        ({"prompt": 7, "completion": ANSWER}, "content_not_text"),
        ({"question": QUESTION, "answer": None}, "empty_answer"),
        ({"messages": None}, "not_a_conversation"),
    ],
)
def test_odd_values_never_crash(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refusal) as refusal:
        conversation_of(row)
    assert refusal.value.reason == reason
