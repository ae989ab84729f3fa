"""Conversations through tokenize, train, evaluate, register's properties and a real server."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nudge.components.common.artifacts.corpus import Document, text_sha256, write_corpus
from nudge.components.common.artifacts.evaluation import Evaluation, Incumbent, read_evaluation
from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.artifacts.tokens import read_tokens_manifest
from nudge.components.common.chat import Message, conversation_of, template_of_folder
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer, smoke_test
from nudge.components.evaluate import incumbent
from nudge.components.evaluate.evaluate import evaluate
from nudge.components.evaluate.settings import EvaluateSettings, ExpectedAnswer, Probe
from nudge.components.register.register import _properties
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.tokenize.tokenize import tokenize
from nudge.components.train.chat_model import check_folder
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.model_server import running_model_server

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITIES = {"red": "Rome", "blue": "Oslo", "green": "Lviv"}
ASKED = ("Which city is {}?", "The city of {}?", "Name the {} city.", "{}?", "Where is {}?")


def conversations(count: int) -> list[Document]:
    made = []
    for number in range(count):
        color = list(CITIES)[number % 3]
        asked = ASKED[number % 5].format(color) + " " * (number % 2) + "!" * (number // 30)
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": CITIES[color]},
        ]
        if number % 4 == 0:
            messages = [{"role": "system", "content": "Be brief."}, *messages]
        made.append(
            Document(str(number), "", "test", conversation=conversation_of({"messages": messages}))
        )
    return sorted(made, key=lambda document: text_sha256(document.body))


@dataclasses.dataclass
class Done:
    folder: Path
    found: Evaluation

    def __getattr__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def done(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A tiny model that is trained on conversations and evaluated."""
    folder = tmp_path_factory.mktemp("chat")
    base = folder / "base"
    shutil.copytree(tiny_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "<|endoftext|>"  # so that only training teaches the end of a turn
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(base)
    documents = conversations(150)
    (folder / "corpus").mkdir()
    counts = {"documents_in": 150, "documents": 150, "bytes": 1, "dropped": {}, "sources": []}
    splits = {"train": documents[30:], "validation": documents[:30]}
    write_corpus(folder / "corpus", splits, counts)
    tokenize(
        TokenizeSettings(base_model=str(base), processes=1),
        corpus=folder / "corpus", tokens=folder / "tokens",
    )  # fmt: skip
    settings = TrainSettings(
        base_model=str(base), sequence_length=96, batch_sequences=4, micro_batch_sequences=4,
        epochs=99, max_steps=120, learning_rate=2e-2, threads=1,
    )  # fmt: skip
    outputs = {name: folder / name for name in ("model", "history", "report")}
    train(settings, tokens=folder / "tokens", **outputs)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(incumbent, "find_incumbent", lambda *_: Incumbent("none"))
        evaluated = {name: folder / name for name in ("evaluation", "page", "scores")}
        evaluated["report"] = evaluated.pop("page")
        evaluate(
            EvaluateSettings(
                base_model=str(base), window=64, stride=32, resamples=1000, answer_tokens=12,
                guards=[],
                probes=[Probe(prompt="Which city is blue?", target="O")],
                prompts=["Name the red city.", "green?"],
                answers=[
                    ExpectedAnswer(prompt="Name the blue city.", answer="oslo", match="exact"),
                    ExpectedAnswer(prompt="red?", answer="^R.me", match="regex"),
                ],
            ),
            corpus=folder / "corpus", model=folder / "model", history=folder / "history",
            **evaluated,
        )  # fmt: skip
    return Done(folder, read_evaluation(folder / "evaluation"))


def test_the_gate_promotes_on_assistant_turns(done: Done) -> None:
    verdict, method = done.found.verdict, done.found.method
    assert verdict is not None
    assert method is not None
    assert verdict.promote, verdict.reason
    assert "bits per byte on assistant turns" in verdict.reason
    assert (method.unit, method.same_template) == ("assistant turns", True)
    kinds = {check.kind: check for check in verdict.checks}
    assert kinds["turn"].message.startswith("4 of 4 answers end")
    assert sum(check.kind == "answer" for check in verdict.checks) == 2
    # Each answer has 4 bytes, and only it and its end-of-turn token are scored.
    metrics = done.found.metrics["candidate"]
    assert metrics.bytes == 4 * 30
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    scored = [
        len(tokenizer(city, add_special_tokens=False)["input_ids"]) + 1 for city in CITIES.values()
    ]
    assert 30 * min(scored) <= (metrics.tokens or 0) <= 30 * max(scored)


def test_the_report_colors_what_is_learned_and_shows_the_answers(done: Done) -> None:
    page = (done.folder / "page").read_text(encoding="utf-8")
    assert "Bits per byte of assistant turns" in page
    for city in CITIES.values():
        assert f"<mark>{city}&lt;|im_end|&gt;</mark>" in page
    assert "<h2>Answers</h2>" in page
    samples = {sample.prompt: sample for sample in done.found.samples}
    assert samples["Name the red city."].after == "Rome"
    assert samples["Name the red city."].before != "Rome"
    assert samples["green?"].messages == ({"role": "user", "content": "green?"},)


def test_the_folder_has_what_a_server_needs(done: Done) -> None:
    assert GenerationConfig.from_pretrained(done.model).eos_token_id == [2, 0]
    facts, manifest = read_model_facts(done.model), read_tokens_manifest(done.tokens)
    assert facts.chat == manifest.chat
    assert facts.chat is not None
    assert facts.chat.end_of_turn_id == 2
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    turns = (Message("system", "S"), Message("user", "U\n"), Message("assistant", " A"))
    rendered = tokenizer.apply_chat_template(
        [turn.for_template() for turn in turns], tokenize=False, add_generation_prompt=False
    )
    template = template_of_folder(done.model)
    assert rendered == template.conversation_text(turns)
    other = dataclasses.replace(facts.chat, template="{{ messages }}")
    with pytest.raises(UserError, match="another tokenizer or template was written"):
        check_folder(done.model, other)
    with pytest.raises(UserError, match="a server would not end a turn"):
        check_folder(done.model, dataclasses.replace(facts.chat, end_of_turn_id=1))


def version_of(done: Done, **changes: Any) -> Version:
    properties = _properties(done.found, read_model_facts(done.model), "run")
    expected = json.loads(str(properties["expected_next"]))
    assert expected[0]["messages"] == [{"role": "user", "content": "Which city is blue?"}]
    expected[0] |= changes
    properties["expected_next"] = json.dumps(expected)
    assert properties["chat"] is True
    return Version("wren", "1", "1", "1", "file:///", False, 0, properties)


@pytest.fixture(scope="module")
def server(done: Done, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """The laptop's own server with the trained model."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(done.model, folder / "wren")
    with running_model_server(folder, "wren") as server:
        yield server


def test_the_laptops_server_answers_as_the_evaluated_model(done: Done, server: ModelServer) -> None:
    settings = DeploySettings(smoke_prompt="Name the green city.")
    answer = smoke_test(server, version_of(done), settings)
    assert answer == "Lviv"  # it ends its turn by itself
    with pytest.raises(UserError, match="the served model is not the evaluated one"):
        smoke_test(server, version_of(done, token="X", p=0.99), settings)
