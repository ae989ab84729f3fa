"""What a served chat model needs in its folder: its template, and the tokens that end its turn."""

import datetime
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.chat_facts import ChatFacts
from nudge.components.common.chat import ChatTemplate, Message, Refusal, template_of_folder
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.end_of_document import end_ids

ASKED = (
    (Message("user", "Hello?"),),
    (Message("system", "Be brief."), Message("user", " 1 < 2?\n")),
    (Message("user", "One?"), Message("assistant", "Two."), Message("user", "<b>Three</b>?")),
)
"""Prompts that must come out of a folder's template as they were trained on."""


def end_turns(model: Any, chat: ChatFacts) -> None:
    """Make the model's generation configuration end an answer at the end-of-turn token, in addition
    to its own end tokens; servers read it."""
    own = end_ids(model.generation_config.eos_token_id)
    ends = list(dict.fromkeys([chat.end_of_turn_id, *own]))
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def check_folder(folder: Path, chat: ChatFacts) -> None:
    """Load a written folder as a server does; raise `UserError` unless it has the template that was
    trained on, renders prompts with it byte for byte, and ends a turn."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    if chat.end_of_turn_id not in end_ids(ends):
        raise UserError(
            f"{folder}/generation_config.json ends a text at {ends}, not at the end-of-turn token "
            f"{chat.end_of_turn} ({chat.end_of_turn_id}), so a server would not end a turn"
        )
    # A server inserts today's date, while training froze one.
    template = template_of_folder(folder, date=datetime.datetime.now().date())
    for turns in ASKED:
        expected = _expected(template, turns)
        if expected is None:
            continue
        served = tokenizer.apply_chat_template(
            [turn.for_template() for turn in turns], tokenize=False, add_generation_prompt=True
        )
        if served != expected or template.text != chat.template:
            raise UserError(
                f"transformers renders a prompt from {folder} as {served!r}, but training rendered "
                f"{expected!r}; another tokenizer or template was written"
            )


def _expected(template: ChatTemplate, turns: tuple[Message, ...]) -> str | None:
    try:
        return template.generation_prompt(turns)
    except Refusal:  # a template may refuse a system turn
        return None
