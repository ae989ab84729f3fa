"""Reads a conversation from a row, in each form in which people store conversations.

| form | columns |
|---|---|
| messages | ``messages``: objects with ``role`` and ``content`` (a text or text parts) |
| ShareGPT | ``conversations`` or ``conversation``: objects with ``from`` and ``value`` |
| prompt and completion | ``prompt`` and ``completion`` or ``response``: texts or messages |
| instruction | ``instruction``, ``output`` or ``response``, and perhaps ``input`` or ``context`` |
| question and answer | ``question`` and ``answer``, or ``query`` and ``response`` |

Each may have a ``system`` (or ``system_prompt``) and a ``tools`` column, and a list may be JSON
text, as it is in CSV files. A message may have ``reasoning_content``, ``tool_calls``, and
``weight`` (0 or 1) or ``train`` (false or true), which decides whether it is learned.
"""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nudge.components.common.chat.conversation import Conversation, Message, checked
from nudge.components.common.chat.refusals import Refusal

LISTS = ("messages", "conversations", "conversation")
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
)
INPUTS = ("input", "context")
SYSTEM = ("system", "system_prompt")
COLUMNS = {*LISTS, *(name for pair in PAIRS for name in pair), *INPUTS, *SYSTEM, "history", "tools"}
"""Every column that `conversation_of` reads; upper and lower case are the same."""

ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
    **{role: role for role in ("system", "user", "assistant", "tool")},
}
CALL = "function_call"
"""ShareGPT's role of a turn that consists of one tool call."""


def is_conversation(columns: Iterable[Any]) -> bool:
    """Whether a row with these columns has one of the forms."""
    names = {_name(column) for column in columns}
    return any(name in names for name in LISTS) or any(set(pair) <= names for pair in PAIRS)


def holds_conversation(values: Mapping[Any, Any]) -> bool:
    """Whether an object is one conversation, not an export that contains a list of texts under a
    name such as ``messages``."""
    for key, value in values.items():
        if _name(key) in LISTS and isinstance(value, list):
            first = value[0] if value else None
            names = set(first) if isinstance(first, Mapping) else set()
            return "role" in names or {"from", "value"} <= names
    return is_conversation(values)


def chat_columns(columns: Iterable[Any]) -> list[Any]:
    """Those of a table's columns that a conversation may need."""
    return [column for column in columns if _name(column) in COLUMNS]


def conversation_of(row: Mapping[Any, Any]) -> Conversation:
    """The conversation in a row; raises `Refusal` if it has none, or none that can be learned."""
    values = {_name(key): value for key, value in row.items() if value is not None}
    messages = [*_system(values), *_turns(values, {_name(key) for key in row})]
    found = checked(Conversation(tuple(messages), tuple(_tools(values.get("tools")))))
    if found.tools or any(message.tool_calls for message in found.messages):
        try:
            found.to_json()
        except (TypeError, ValueError) as error:  # a date in a Parquet column
            raise Refusal("bad_tool_call", str(error)[:200]) from None
    return found


def _name(column: Any) -> str:
    return column.strip().lower() if isinstance(column, str) else ""


def _system(values: Mapping[str, Any]) -> Iterator[Message]:
    for name in SYSTEM:
        if text := values.get(name):
            yield Message("system", _text(text))
            return


def _turns(values: Mapping[str, Any], names: set[str]) -> Iterator[Message]:
    """The turns after the system turn. Of several forms, one with values comes first; ``names`` are
    all columns, also those without a value."""
    for name in LISTS:
        if name in values:
            yield from _messages(values[name])
            return
    for present in (set(values), names):
        for asked, answered in PAIRS:
            if {asked, answered} <= present:
                yield from _pair(values, asked, answered)
                return
    raise Refusal("not_a_conversation", ", ".join(sorted(names)))


def _pair(values: Mapping[str, Any], asked: str, answered: str) -> Iterator[Message]:
    for exchange in _list(values.get("history") or []):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise Refusal("bad_messages", "history: expected pairs of a question and its answer")
        yield Message("user", _text(exchange[0]).strip())
        yield Message("assistant", _text(exchange[1]).strip())
    yield from _side(values, asked, "user")
    yield from _side(values, answered, "assistant")


def _side(values: Mapping[str, Any], column: str, role: str) -> Iterator[Message]:
    value = values.get(column, "")
    if isinstance(value, list):
        yield from _messages(value)
        return
    text = _text(value).strip()
    if column == "instruction":
        more = next((values[name] for name in INPUTS if values.get(name)), "")
        text = "\n\n".join(part for part in (text, _text(more).strip()) if part)
    yield Message(role, text)


def _messages(value: Any) -> Iterator[Message]:
    for number, item in enumerate(_list(value), 1):
        yield _message(item, number)


def _list(value: Any) -> list[Any]:
    if isinstance(value, str):
        value = _parsed(value, "bad_messages")
    if not isinstance(value, list | tuple):
        raise Refusal("bad_messages", f"expected a list, found {_kind(value)}")
    return list(value)


def _parsed(text: str, reason: str) -> Any:
    """The value of JSON text, or of Python's notation for it, which pandas writes into CSV."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            raise Refusal(reason, str(error)[:200]) from None


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, Mapping):
        raise Refusal("bad_message", f"message {number} is {_kind(item)}")
    values = {key: value for key, value in item.items() if value is not None}
    named = values.get("role", values.get("from"))
    content = values.get("content", values.get("value", ""))
    if not isinstance(named, str):
        raise Refusal("bad_message", f"message {number} has no role; it has {', '.join(values)}")
    calls = values.get("tool_calls") or []
    role = _name(named)
    if role == CALL:
        role, calls, content = "assistant", [_parsed(_text(content), "bad_tool_call")], ""
    if role not in ALIASES:
        raise Refusal("unknown_role", f"message {number}: {named[:50]}")
    reasoning = next(
        (values[key] for key in ("reasoning_content", "reasoning", "thinking") if key in values), ""
    )
    return Message(
        ALIASES[role],
        _text(content, number),
        _text(reasoning, number),
        tuple(_call(call, number) for call in _list(calls)),
        str(values.get("tool_call_id", "")),
        str(values.get("name", "")),
        _learn(values, number),
    )


def _text(content: Any, number: int = 0) -> str:
    """The text of a content; parts follow each other without a separator, as in transformers."""
    if isinstance(content, str):
        return content
    where = f"message {number}: " if number else ""
    if not isinstance(content, list | tuple):
        raise Refusal("content_not_text", f"{where}it is {_kind(content)}")
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            named = kind if isinstance(part, Mapping) else _kind(part)
            raise Refusal("content_not_text", f"{where}it has a part of the type {named}")
        parts.append(text)
    return "".join(parts)


def _learn(values: Mapping[str, Any], number: int) -> bool:
    for key in ("train", "weight"):
        if key in values:
            value = values[key]
            if isinstance(value, str):
                value = {"true": True, "false": False, "0": 0, "1": 1}.get(value.lower(), value)
            if value not in (0, 1):
                shown = f"message {number}: {key} = {value!r}, expected 0, 1, false or true"
                raise Refusal("bad_weight", shown)
            return bool(value)
    return True


def _call(call: Any, number: int) -> dict[str, Any]:
    """A tool call as templates and vLLM expect it: its arguments are an object, not JSON text."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise Refusal("bad_tool_call", f"message {number}: a call without a name")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, "bad_tool_call") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise Refusal("bad_tool_call", f"message {number}: arguments are {_kind(arguments)}")
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": inner["name"], "arguments": dict(arguments)},
    }
    return {"id": str(call["id"]), **made} if call.get("id") else made


def _tools(value: Any) -> Iterator[dict[str, Any]]:
    if value is None or value == "":
        return
    if isinstance(value, str):
        value = _parsed(value, "bad_tools")
    if not isinstance(value, list | tuple):
        raise Refusal("bad_tools", f"expected a list, found {_kind(value)}")
    for tool in value:
        if isinstance(tool, str):
            tool = _parsed(tool, "bad_tools")
        if not isinstance(tool, Mapping):
            raise Refusal("bad_tools", f"a tool is {_kind(tool)}")
        yield dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "no text")
