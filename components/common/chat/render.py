"""Renders a conversation for training, and proves which characters of it are learned.

The learned part of an answer begins where the generation prompt ends, which is where the served
model will begin to write, and ends with the end-of-turn token. Both positions come from rendering
prefixes of the conversation, and every record is checked:

- the prompt of each learned turn is a prefix of the text, up to the generation prompt's own end;
- the text up to the end of the turn is the same with and without the turns that follow;
- the answer is in the learned part, and the end-of-turn token ends it.

So no text of a user, a system turn or a tool can be in it. Some templates render an earlier turn
differently once others follow (they strip its reasoning, for example). For such a conversation
there is one text per learned turn, which ends with that turn, as the model will see it.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.chat.refusals import Refusal

if TYPE_CHECKING:
    from nudge.components.common.chat.template import ChatTemplate

Learn = Literal["assistant", "last", "all"]
MARK = "\ue000answer\ue000"
"""An answer that no template and no conversation contains."""
SHORT = 12
"""Shorter prompts may occur in a template's own text by chance."""
SHOWN = 40
"""Characters around the first difference that a refusal shows."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text to train on; ``learned`` are half-open ranges of its characters, in order and apart.
    Each range of an answer ends with the end-of-turn token."""

    text: str
    learned: tuple[tuple[int, int], ...]


def render(
    template: "ChatTemplate", conversation: Conversation, learn: Learn = "assistant"
) -> list[Rendered]:
    """The texts that teach a conversation: one, or one per learned turn (see the module).

    ``learn`` chooses every assistant turn, the last one, or all text; a turn with ``learn=False``
    is never learned. Raises `Refusal` if nothing can be learned or a check fails.
    """
    return _Renderer(template, conversation).texts(learn)


class _Renderer:
    def __init__(self, template: "ChatTemplate", conversation: Conversation) -> None:
        self._template, self._messages = template, conversation.messages
        self._values = [message.for_template() for message in conversation.messages]
        self._tools = conversation.tools
        for number, message in enumerate(self._messages, 1):
            for text in message.texts():
                if found := template.control_token_in(text):
                    raise Refusal("control_token", f"turn {number} contains {found}")

    def texts(self, learn: Learn) -> list[Rendered]:
        """Do what `render` does."""
        count = len(self._messages)
        answers = [n for n, m in enumerate(self._messages) if m.role == "assistant"]
        turns = answers[-1:] if learn == "last" else answers
        turns = [turn for turn in turns if self._messages[turn].learn]
        if not turns:
            raise Refusal("nothing_learned")
        text = self._text(count)
        if learn == "all":
            return [self._all(text)]
        spans = []
        for turn in turns:
            if (span := self._span(text, turn, count)) is None:
                return [self._one(turn) for turn in turns]
            spans.append(span)
        return [Rendered(text, tuple(spans))]

    def _one(self, turn: int) -> Rendered:
        text = self._text(turn + 1)
        span = self._span(text, turn, turn + 1)
        if span is None:
            raise self._difference(text, turn)
        return Rendered(text, (span,))

    def _all(self, text: str) -> Rendered:
        """All of a text but the answers that must not be learned."""
        start, spans = 0, []
        for turn, message in enumerate(self._messages):
            if message.learn:
                continue
            if (span := self._span(text, turn, len(self._messages))) is None:
                raise self._difference(text, turn)
            spans.append((start, span[0]))
            start = span[1]
        spans.append((start, len(text)))
        return Rendered(text, tuple((first, end) for first, end in spans if first < end))

    def _span(self, text: str, turn: int, count: int) -> tuple[int, int] | None:
        """The learned part of a turn in the text of the first ``count`` messages; None if the text
        does not begin as it does without the turns that follow."""
        start = self._start(text, turn)
        if start is None:
            return None
        alone = text if turn + 1 == count else self._text(turn + 1)
        same = len(alone) if text.startswith(alone) else common_length(alone, text)
        end = self._end(alone, turn, start)
        if end > same:
            return None
        self._check_answer(text[start:end], turn)
        return start, end

    def _start(self, text: str, turn: int) -> int | None:
        """Where the answer begins; None if the prompt is no prefix of the text."""
        prompt = self._text(turn, prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # The generation prompt may open a think tag, which an answer without reasoning lacks. Then
        # the answer begins where they part, which must be inside the generation prompt. The answer
        # itself may begin with a character of the tag, so another answer shows where that is.
        bare = self._text(turn)
        message = self._messages[turn]
        other = dataclasses.replace(
            message, content=MARK, reasoning_content=MARK if message.reasoning_content else ""
        )
        start = common_length(
            prompt, self._render([*self._values[:turn], other.for_template()], False)
        )
        inside = start >= common_length(prompt, bare) and _is_prompt(prompt, bare)
        return start if inside and text[:start] == prompt[:start] else None

    def _end(self, alone: str, turn: int, start: int) -> int:
        """The end of the end-of-turn token of the last turn of a text."""
        end_of_turn = self._template.end_of_turn
        at = alone.find(end_of_turn, start)
        if at >= 0:
            return at + len(end_of_turn)
        # A turn that calls a tool may end with a token of its own, such as <|eom_id|>.
        tail = alone[start:].rstrip()
        if self._messages[turn].tool_calls:
            for token in sorted(self._template.control_tokens, key=len, reverse=True):
                if tail.endswith(token):
                    return start + len(tail)
        raise Refusal("no_end_of_turn", f"turn {turn + 1} ends with {tail[-SHOWN:]!r}")

    def _check_answer(self, learned: str, turn: int) -> None:
        """Raise `Refusal` if the learned text lacks the answer or has text of another turn."""
        message = self._messages[turn]
        # A template may leave out what a turn says before it calls a tool, as Llama 3's does.
        answer = "" if message.tool_calls else message.content.rpartition("</think>")[2].strip()
        names = [call["function"]["name"] for call in message.tool_calls]
        if missing := next((each for each in (answer, *names) if each not in learned), ""):
            at = common_length(missing, learned)
            shown = f"turn {turn + 1}: {missing[at:][:SHOWN]!r} became {learned[at:][:SHOWN]!r}"
            raise Refusal("answer_rewritten", shown)
        added = learned
        for own in message.texts():
            added = added.replace(own.strip(), "", 1)
        for number, other in enumerate(self._messages if len(added) >= SHORT else (), 1):
            text = other.content.strip()
            is_asked = other.role in ("system", "user") and len(text) >= SHORT
            if is_asked and not message.tool_calls and text in added:
                raise Refusal("prompt_learned", f"turn {turn + 1} would teach turn {number}")

    def _difference(self, text: str, turn: int) -> Refusal:
        prompt = self._text(turn, prompt=True)
        at = common_length(prompt, text)
        before, after = prompt[at : at + SHOWN], text[at : at + SHOWN]
        return Refusal(
            "prompt_changes",
            f"turn {turn + 1}, at character {at}, after {prompt[max(0, at - SHOWN) : at]!r}: "
            f"{before!r} became {after!r}",
        )

    def _text(self, count: int, prompt: bool = False) -> str:
        return self._render(self._values[:count], prompt)

    def _render(self, values: list[dict[str, Any]], prompt: bool) -> str:
        return self._template.rendered(values, self._tools, prompt)


def common_length(first: str, second: str) -> int:
    """The number of characters at the beginning that two texts share."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _is_prompt(prompt: str, bare: str) -> bool:
    """Whether a text with a generation prompt continues the one without."""
    return len(prompt) > common_length(prompt, bare)
