"""A model's chat template: its text, where it comes from, and its end-of-turn token."""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2

from nudge.components.common.chat.conversation import Conversation, Message
from nudge.components.common.chat.refusals import Refusal
from nudge.components.common.chat.render import MARK, Learn, Rendered, common_length, render
from nudge.components.common.chat.sandbox import FAULTS, compiled
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_checks import TEMPLATE, read_template

Origin = Literal["model", "recipe", "chatml"]
FROZEN = datetime.date(2024, 7, 26)
"""The date that a template inserts: the one that Llama 3's template uses without a clock."""
START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + 'END\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a base without a template; ``END`` stands for its end-of-turn token."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template that was compiled and tried once.

    ``named_tokens`` are the tokens that a template may use by name, such as ``eos_token``;
    ``control_tokens`` are all special tokens of the tokenizer. Raises `UserError` if the template
    cannot be compiled, cannot render one question and its answer, or writes no end-of-turn token.
    """

    text: str
    source: Origin
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    control_tokens: frozenset[str] = frozenset()
    date: datetime.date = FROZEN

    def __post_init__(self) -> None:
        _ = self.end_of_turn  # reports every fault of the template

    @functools.cached_property
    def end_of_turn(self) -> str:
        """The control token that a template writes after an answer, as text."""
        text = self.conversation_text(self._tried)
        _, found, tail = text.rpartition(MARK)
        if not found:
            raise UserError(
                f"{self._name} leaves out the answer; it renders: {text[:500]!r}; correct it, or "
                "set tokenize.chat_template to another template"
            )
        match = self.control.search(tail) if self.control_tokens else None
        if not match:
            known = ", ".join(sorted(self.control_tokens)[:10]) or "none"
            raise UserError(
                f"{self._name} writes no end-of-turn token after an answer, but {tail[:100]!r}, so "
                f"a model could not learn to stop; special tokens of the tokenizer: {known}; set "
                "tokenize.chat_template to a template that ends an answer with one of them"
            )
        return match.group()

    @functools.cached_property
    def opened_by_prompt(self) -> str:
        """The end of the generation prompt that an answer without reasoning lacks, such as
        ``<think>``: a served model sees it, but answers without reasoning do not teach it."""
        prompt, text = self.generation_prompt(self._tried[:-1]), self.conversation_text(self._tried)
        return prompt[common_length(prompt, text) :]

    @functools.cached_property
    def _tried(self) -> list[Message]:
        """The shortest conversation that the template renders; its answer is `MARK`."""
        asked = [Message("user", "Hello?"), Message("assistant", MARK)]
        try:
            self.conversation_text(asked)
        except Refusal:
            asked.insert(0, Message("system", "Be brief."))  # it may require a system turn
            try:
                self.conversation_text(asked)
            except Refusal as refusal:
                raise UserError(f"{self._name} cannot render a conversation: {refusal}") from None
        return asked

    @functools.cached_property
    def control(self) -> re.Pattern[str]:
        """Finds a control token in a text."""
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def _name(self) -> str:
        whose = {"model": "the base model's", "recipe": "the recipe's", "chatml": "the ChatML"}
        return f"{whose[self.source]} chat template"

    def control_token_in(self, text: str) -> str:
        """The first control token that a text spells out, or an empty string."""
        match = self.control.search(text)
        return match.group() if match else ""

    def render(self, conversation: Conversation, learn: Learn = "assistant") -> list[Rendered]:
        """The texts to train on, with their learned characters; see the module `render`."""
        return render(self, conversation, learn)

    def conversation_text(
        self, messages: Iterable[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The text of a conversation; raises `Refusal` if the template raises an error."""
        return self.rendered([message.for_template() for message in messages], tools, False)

    def generation_prompt(
        self, messages: Iterable[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The prompt after which the model writes the next answer; raises `Refusal` likewise."""
        return self.rendered([message.for_template() for message in messages], tools, True)

    def rendered(
        self, values: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], prompt: bool
    ) -> str:
        """The text of the values that `Message.for_template` gives; raises `Refusal`."""
        try:
            return self._render(
                messages=values,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=prompt,
                **self.named_tokens,
            )
        except FAULTS as error:
            raise Refusal("template_raises", f"{type(error).__name__}: {error}"[:300]) from None

    @functools.cached_property
    def _render(self) -> Any:
        try:
            return compiled(self.text, self.date)
        except jinja2.TemplateError as error:
            raise UserError(f"{self._name} cannot be compiled: {error}") from None


def template_of_folder(
    folder: Path, override: str = "", date: datetime.date = FROZEN
) -> ChatTemplate:
    """The chat template of a tokenizer's folder, ``override`` instead, or ChatML if there is none.

    Raises `UserError` as `ChatTemplate` does, and for a tokenizer without any end token.
    """
    config = _json(folder / "tokenizer_config.json")
    named = _named_tokens(folder, config)
    control = _control_tokens(folder, config) | frozenset(named.values())
    if override:
        return ChatTemplate(override, "recipe", named, control, date)
    if own := _own_template(folder, config):
        return ChatTemplate(own, "model", named, control, date)
    return chatml(named, control, date)


def chatml(
    named_tokens: Mapping[str, str], control_tokens: frozenset[str], date: datetime.date = FROZEN
) -> ChatTemplate:
    """ChatML for a base without a template. An answer ends with ``<|im_end|>`` if the tokenizer has
    that token, else with its EOS token. Raises `UserError` if it has neither."""
    end = END if END in control_tokens else named_tokens.get("eos_token", "")
    if not end:
        raise UserError(
            "the base model has neither a chat template nor an end-of-turn token (<|im_end|> or "
            "EOS), so it could not learn to end its answer; choose another base model"
        )
    text = CHATML.replace("END", end.replace("\\", "\\\\").replace("'", "\\'"))
    # Where they are no tokens of the model, the marks must still not be spelled out in a turn.
    return ChatTemplate(text, "chatml", named_tokens, control_tokens | {START, END}, date)


def _own_template(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / TEMPLATE
    if path.is_file():
        return read_template(path)
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # one per use
        templates = {each["name"]: each["template"] for each in found}
        found = templates.get("default", next(iter(templates.values()), ""))
    return str(found or "")


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens by their names, such as ``eos_token``, as transformers passes them."""
    named = {}
    for values in (_json(folder / "special_tokens_map.json"), config):
        for key, value in values.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str) and text:
                named[key] = text
    return named


def _control_tokens(folder: Path, config: Mapping[str, Any]) -> frozenset[str]:
    added = [
        *_json(folder / "tokenizer.json").get("added_tokens", []),
        *config.get("added_tokens_decoder", {}).values(),
    ]
    return frozenset(each["content"] for each in added if each.get("special") and each["content"])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}
