"""What is checked where a recipe names no prompts and no guards."""

import json
import shutil

import pytest
import torch

from nudge.components.common.artifacts.corpus import (
    Document,
    read_documents,
)
from nudge.components.common.artifacts.evaluation import read_evaluation
from nudge.components.common.core.publish import write_manifest
from nudge.components.evaluate.settings import EvaluateSettings, Guard
from nudge.components.evaluate.texts import beginnings, guards_of
from tests.components.evaluate.workspace import Workspace

pytestmark = pytest.mark.usefixtures("served_is")


def test_without_prompts_and_guards_there_are_default_ones(workspace: Workspace) -> None:
    """A model that lost its English and answers "eeee" fails both."""
    collapsed = workspace.folder / "collapsed"
    shutil.copytree(workspace.folder / "candidate", collapsed)
    from nudge.components.common.models.language_model import load_model, load_tokenizer

    model, tokenizer = load_model(collapsed), load_tokenizer(collapsed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    # Any text continues with "eeee", so that all else, plain English included, gets worse.
    ids = torch.tensor([[0, *tokenizer("the tower of Paris " + "e" * 60)["input_ids"]]])
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(collapsed)
    result = workspace.run("collapsed", prompts=None, guards=None)
    assert not result["verdict"]["promote"]
    (guard,) = result["guards"]
    assert guard["name"] == "plain English"
    assert not guard["ok"]
    held_out = [each.text for each in read_documents(workspace.folder / "corpus", "validation")]
    prompts = [sample["prompt"] for sample in result["samples"]]
    assert len(prompts) == 3
    assert all(any(text.startswith(prompt) for text in held_out) for prompt in prompts)
    verdict = read_evaluation(workspace.folder / "evaluation").verdict
    assert verdict is not None
    assert any("repeats one" in check.message for check in verdict.checks if not check.ok)


def test_a_model_from_scratch_has_no_default_guard(workspace: Workspace) -> None:
    settings = EvaluateSettings(base_model="unused")
    assert [guard.name for guard in guards_of(settings, workspace.folder / "candidate")] == [
        "plain English"
    ]
    scratch = workspace.folder / "scratch"
    scratch.mkdir()
    body = json.loads((workspace.folder / "candidate" / "nudge.json").read_text())
    body["training"] = {"mode": "scratch"}
    write_manifest(scratch / "nudge.json", "nudge.model", 1, body)
    assert guards_of(settings, scratch) == []
    chosen = EvaluateSettings(base_model="unused", guards=[Guard(name="g", uri="x")])
    assert guards_of(chosen, scratch) == chosen.guards


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("The tower of Paris stands on a river and is old", "The tower of Paris"),
        ("It ends here. And then it goes on for a long time", "It ends here. And then"),
        ("A first sentence. More of it follow", ""),
        (
            "他们在每个星期六的早晨都会去河边散步而且总是带着狗一起去",
            "他们在每个星期六的早晨都会去",
        ),
        ("short", ""),
    ],
)
def test_default_prompts_end_within_a_sentence_and_leave_half_of_the_text(
    text: str, prompt: str
) -> None:
    assert beginnings([Document("1", text, "x")], 3) == ([prompt] if prompt else [])
