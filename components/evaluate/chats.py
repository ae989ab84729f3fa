"""Conversations in an evaluation: what is scored of them, and how a chat model is asked.

Each model gets a conversation through its own chat template. Where two templates are the same, both
models score the same tokens. Otherwise their losses can only be compared per byte: the bytes of the
assistant turns themselves, whatever a template adds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nudge.components.common.artifacts.corpus import Document
from nudge.components.common.artifacts.evaluation import LearnedSample
from nudge.components.common.chat import ChatTemplate, Conversation, Message, Refusal
from nudge.components.common.chat.masks import Encoder, Masked, rendered
from nudge.components.common.core.errors import UserError
from nudge.components.evaluate.settings import EvaluateSettings
from nudge.components.evaluate.texts import beginnings

SHOWN = 3
"""Held-out conversations that a report shows, and whose first turn is asked without `prompts`."""
DEFAULT_PROMPTS = 3
"""Held-out texts whose beginnings are completed without `prompts`."""


@dataclass(frozen=True)
class Question:
    """What a model is asked: turns, or a text to continue if ``messages`` is empty."""

    text: str
    messages: tuple[Message, ...] = ()

    def ids(self, tokenizer: Any, template: ChatTemplate | None) -> list[int]:
        """The ids of the prompt, as a server gives them to the model."""
        if template is None or not self.messages:
            found: list[int] = tokenizer(self.text)["input_ids"]
            return found
        prompt = template.generation_prompt(self.messages)
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def plain_turns(asked: Question) -> tuple[dict[str, str], ...] | None:
    """The turns of a question as a server gets them; None for a text."""
    turns = tuple({"role": turn.role, "content": turn.content} for turn in asked.messages)
    return turns or None


def question(prompt: str, settings: EvaluateSettings, chat: bool) -> Question:
    """A configured prompt: for a chat model, a user turn after the configured system turn."""
    if not chat:
        return Question(prompt)
    system = (Message("system", settings.system),) if settings.system else ()
    return Question(prompt, (*system, Message("user", prompt)))


def questions(
    settings: EvaluateSettings, documents: Sequence[Document], chat: bool
) -> list[Question]:
    """The prompts that every model completes: those of the settings, or else the beginnings of
    held-out texts or conversations."""
    if settings.prompts is not None:
        return [question(prompt, settings, chat) for prompt in settings.prompts]
    if not chat:
        return [Question(prompt) for prompt in beginnings(documents, DEFAULT_PROMPTS)]
    found = [each.conversation for each in documents if each.conversation is not None]
    return [_opening(conversation) for conversation in found[:SHOWN]]


def _opening(conversation: Conversation) -> Question:
    turns = conversation.messages
    end = next(number for number, turn in enumerate(turns) if turn.role == "user") + 1
    return Question(turns[end - 1].content, turns[:end])


class Scorer:
    """Encodes the documents to score for one model: texts, and conversations as ids and masks."""

    def __init__(self, folder: Path, tokenizer: Any, template: ChatTemplate | None) -> None:
        self._tokenizer, self._template = tokenizer, template
        path = folder / "tokenizer.json"
        if template is not None and path.is_file():
            self._encoder = Encoder(path.read_text(encoding="utf-8"), self._ids)

    def samples(self, conversation: Conversation) -> list[Masked]:
        """The ids and learned spans of a conversation; raises `Refusal` if it has none."""
        assert self._template is not None
        found = self._encoder.encode(rendered(self._template, conversation))
        for each in found:
            if isinstance(each, Refusal):
                raise each
        return [each for each in found if isinstance(each, Masked)]

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(ids, np.int64) for ids in encoded]


def scorable(
    documents: Sequence[Document], scorers: Mapping[str, Scorer]
) -> tuple[list[Document], dict[str, int]]:
    """The documents that every model can score, and the others counted by reason.

    Raises `UserError` if fewer than half are left.
    """
    kept: list[Document] = []
    refused: dict[str, int] = {}
    for document in documents:
        try:
            if document.conversation is not None:
                for scorer in scorers.values():
                    scorer.samples(document.conversation)
        except Refusal as refusal:
            refused[refusal.reason] = refused.get(refusal.reason, 0) + 1
        else:
            kept.append(document)
    if len(kept) < len(documents) / 2:
        raise UserError(
            f"{len(documents) - len(kept)} of {len(documents)} held-out conversations cannot be "
            f"rendered for {', '.join(scorers)} ({refused}); set tokenize.chat_template"
        )
    return kept, refused


def assistant_text(conversation: Conversation) -> str:
    """The text that is scored: that of the assistant turns that are learned."""
    return "\n\n".join(
        text
        for message in conversation.messages
        if message.role == "assistant" and message.learn
        for text in message.texts()
    )


def unit_of(documents: Sequence[Document]) -> str:
    """What the scores are about: ``held-out text``, ``assistant turns``, or both."""
    chats = sum(document.conversation is not None for document in documents)
    if not chats:
        return "held-out text"
    return "assistant turns" if chats == len(documents) else "assistant turns and held-out text"


def learned_samples(
    documents: Sequence[Document], template: ChatTemplate | None
) -> tuple[LearnedSample, ...]:
    """The first conversations as the candidate's template renders them, with what is learned."""
    found = [each.conversation for each in documents if each.conversation is not None]
    if template is None:
        return ()
    return tuple(
        LearnedSample(text=each.rendered.text, learned=each.rendered.learned)
        for conversation in found[:SHOWN]
        for each in rendered(template, conversation)[:1]
    )
