"""Conversations: the typed form in which every step exchanges them, and its JSON.

The JSON is the ``messages`` format that OpenAI, Hugging Face and OpenShift AI document:
``{"messages": [{"role", "content"}, ...], "tools": [...]}``. A message may also have
``reasoning_content``, ``tool_calls``, ``tool_call_id``, ``name`` and ``"train": false``.
`nudge.components.common.chat.forms` reads the other forms in which people store conversations.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nudge.components.common.chat.refusals import Refusal


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``tool_calls`` are JSON objects ``{"id"?, "type": "function", "function": {"name",
    "arguments"}}`` whose arguments are an object; ``learn`` is False for an assistant turn that
    must not be learned."""

    role: str
    content: str
    reasoning_content: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str = ""
    name: str = ""
    learn: bool = True

    def plain(self) -> dict[str, Any]:
        """The message as JSON values, without empty fields."""
        made: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning_content", "tool_call_id", "name"):
            if value := getattr(self, key):
                made[key] = value
        if self.tool_calls:
            made["tool_calls"] = list(self.tool_calls)
        if not self.learn:
            made["train"] = False
        return made

    def for_template(self) -> dict[str, Any]:
        """The message as transformers and vLLM pass it to a chat template."""
        made: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content:
            made |= dict.fromkeys(("thinking", "reasoning_content"), self.reasoning_content)
        if self.tool_calls:
            made["tool_calls"] = list(self.tool_calls)
        for key in ("tool_call_id", "name"):
            if value := getattr(self, key):
                made[key] = value
        return made

    def texts(self) -> list[str]:
        """Everything a person or a model wrote in this turn."""
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in self.tool_calls]
        return [text for text in (self.reasoning_content, self.content, *calls) if text]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in a valid order (`checked`), and the tools that the assistant could call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def plain(self) -> dict[str, Any]:
        """The conversation as JSON values."""
        made: dict[str, Any] = {"messages": [message.plain() for message in self.messages]}
        if self.tools:
            made["tools"] = list(self.tools)
        return made

    def to_json(self) -> str:
        """The conversation as one line of JSON; equal conversations give equal text."""
        return json.dumps(self.plain(), ensure_ascii=False)

    def transcript(self) -> str:
        """Every turn's text, separated by blank lines; for statistics, never for training."""
        return "\n\n".join(text for message in self.messages for text in message.texts())

    def user_side(self) -> str:
        """The text of the system turn and of every user turn."""
        asked = (m.content for m in self.messages if m.role in ("system", "user"))
        return "\n\n".join(asked)

    def first_user_turn(self) -> str:
        """The text of the first user turn."""
        return next(m.content for m in self.messages if m.role == "user")

    def with_messages(self, messages: Iterable[Message]) -> "Conversation":
        """The same conversation with other messages."""
        return dataclasses.replace(self, messages=tuple(messages))


def from_plain(values: Mapping[str, Any]) -> Conversation:
    """The conversation of which `Conversation.plain` made these values; it is not checked."""
    return Conversation(
        tuple(
            Message(
                each["role"],
                each["content"],
                each.get("reasoning_content", ""),
                tuple(each.get("tool_calls", ())),
                each.get("tool_call_id", ""),
                each.get("name", ""),
                each.get("train", True),
            )
            for each in values["messages"]
        ),
        tuple(values.get("tools", ())),
    )


def from_json(text: str) -> Conversation:
    """The conversation of a text that `Conversation.to_json` made."""
    return from_plain(json.loads(text))


def checked(conversation: Conversation) -> Conversation:
    """The conversation up to its last assistant turn, since nothing after it can be learned.

    At most one system turn comes first; then user and assistant turns alternate, with tool results
    between two assistant turns. Raises `Refusal` for any other order and for an empty turn.
    """
    messages = conversation.messages
    roles = [message.role for message in messages]
    if not roles:
        raise Refusal("no_messages")
    if roles.count("system") > 1:
        raise Refusal("two_system_turns")
    if "assistant" not in roles:
        raise Refusal("no_assistant_turn")
    last = len(roles) - 1 - roles[::-1].index("assistant")
    messages = messages[: last + 1]
    before = ""
    for number, message in enumerate(messages, 1):
        _check_turn(message, number, before)
        before = message.role
    return conversation.with_messages(messages)


FOLLOWS = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""The roles that a turn may follow; empty at the beginning."""


def _check_turn(message: Message, number: int, before: str) -> None:
    role = message.role
    if before not in FOLLOWS[role]:
        where = f"turn {number} is {role}, and {f'{before} precedes it' if before else 'the first'}"
        raise Refusal("role_order", where)
    if message.content.strip() or message.tool_calls:
        return
    if role == "assistant":
        raise Refusal("empty_answer", f"turn {number}")
    if role == "user":
        raise Refusal("empty_prompt", f"turn {number}")
