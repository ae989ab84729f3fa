"""Conversations through tokenize, train, evaluate, register's properties and a real server."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nudge.components.common.artifacts.corpus import (
    Document,
    read_documents,
    text_sha256,
    write_corpus,
)
from nudge.components.common.artifacts.evaluation import Evaluation, Incumbent, read_evaluation
from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.artifacts.tokens import read_tokens_manifest
from nudge.components.common.chat import Message, conversation_of, template_of_folder
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer, smoke_test
from nudge.components.evaluate import incumbent
from nudge.components.evaluate.chats import Scorer, learned_samples, scorable
from nudge.components.evaluate.evaluate import evaluate
from nudge.components.evaluate.judge import judge
from nudge.components.evaluate.settings import EvaluateSettings, ExpectedAnswer, Probe
from nudge.components.register.register import _properties
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.tokenize.tokenize import tokenize
from nudge.components.train.output.chat_model import check_folder
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
    assert answer.text == "Lviv"  # it ends its turn by itself
    with pytest.raises(UserError, match="the served model is not the evaluated one"):
        smoke_test(server, version_of(done, token="X", p=0.99), settings)


def test_models_with_other_templates_are_compared_per_byte(done: Done, tmp_path: Path) -> None:
    """The incumbent reads the same answers after another header, with another end of a turn."""
    served = tmp_path / "served"
    shutil.copytree(done.base, served)
    tokenizer = AutoTokenizer.from_pretrained(served)
    tokenizer.chat_template = (
        "{% for m in messages %}## {{ m.role }}: {{ m.content }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}## assistant: {% endif %}"
    )
    tokenizer.save_pretrained(served)
    settings = EvaluateSettings(
        base_model=str(done.base), window=96, stride=48, resamples=1000, answer_tokens=4,
        guards=[], prompts=[],
    )  # fmt: skip
    outputs = {name: tmp_path / name for name in ("evaluation", "report", "scores")}
    judge(
        settings, incumbent=Incumbent("found", uri="s3://b/served"), served=served, guards={},
        corpus=done.corpus, model=done.model, history=done.history, **outputs,
    )  # fmt: skip
    found = read_evaluation(tmp_path / "evaluation")
    assert found.method is not None
    assert found.method.same_template is False
    names = ("base", "candidate", "incumbent")
    base, candidate, other = (found.metrics[name] for name in names)
    assert base.bytes == candidate.bytes == other.bytes == 4 * 30
    assert base.tokens == candidate.tokens
    held_out = [each for each in read_documents(done.corpus, "validation") if each.conversation]
    scorer = Scorer(served, load_tokenizer(served), template_of_folder(served))
    model = load_model(served)
    nats = 0.0
    for document in held_out:
        assert document.conversation is not None
        (masked,) = scorer.samples(document.conversation)
        ids = torch.from_numpy(masked.ids)[None]
        ((first, last),) = masked.learned.tolist()
        answer = document.conversation.messages[-1].content
        assert tokenizer.decode(masked.ids[first:last]) == f"{answer}<|endoftext|>"
        logits = model(ids).logits[0, first - 1 : last - 1].double()
        nats += float(
            torch.nn.functional.cross_entropy(logits, ids[0, first:last], reduction="sum")
        )
    assert other.bits_per_byte == pytest.approx(nats / (4 * 30) / math.log(2), rel=1e-4)
    assert found.verdict is not None
    assert candidate.bits_per_byte is not None
    assert other.bits_per_byte is not None
    comparison = found.verdict.comparisons["incumbent"]
    assert comparison.difference_bits_per_byte == pytest.approx(
        candidate.bits_per_byte - other.bits_per_byte
    )
    page = (tmp_path / "report").read_text(encoding="utf-8")
    assert "different chat templates, so only figures per byte can be compared" in page


def test_a_spelled_out_control_token_is_scored_as_text(done: Done) -> None:
    """As it was learned; a server's tokenizer would end the turn there."""
    turns = [
        {"role": "user", "content": "What ends a turn?"},
        {"role": "assistant", "content": "<|im_end|> does"},
    ]
    document = Document("1", "", "test", conversation=conversation_of({"messages": turns}))
    template = template_of_folder(done.model)
    scorer = Scorer(done.model, load_tokenizer(done.model), template)
    kept, refused = scorable([document], {"candidate": scorer})
    assert (kept, refused) == ([document], {})
    assert document.conversation is not None
    (masked,) = scorer.samples(document.conversation)
    ((first, last),) = masked.learned.tolist()
    learned = masked.ids[first:last].tolist()
    assert learned.count(2) == 1
    assert learned[-1] == 2
    (sample,) = learned_samples([document], template)
    ((start, end),) = sample.learned
    assert sample.text[start:end] == "<|im_end|> does<|im_end|>"
