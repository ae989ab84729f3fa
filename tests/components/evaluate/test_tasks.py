"""Tasks of lm-evaluation-harness: a task file of our own, offline, and the errors."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.settings import parse
from nudge.components.evaluate.checks import task_checks
from nudge.components.evaluate.settings import EvaluateSettings
from nudge.components.evaluate.tasks import Measured, check_tasks, compare_tasks, run_tasks

QUESTIONS = [
    ("The Eiffel Tower is in", [" Paris", " Rome"], 0),
    ("Rome is in", [" x", " Italy"], 1),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the task ``capitals``: the likelier of two continuations is the answer."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [
        json.dumps({"question": question, "choices": choices, "answer": answer})
        for question, choices, answer in QUESTIONS * 3
    ]
    (tmp_path / "capitals.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "capitals.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "capitals.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def settings(folder: Path | str, *tasks: Any) -> EvaluateSettings:
    values = {"base_model": "unused", "tasks": list(tasks), "task_folder": str(folder)}
    return parse(EvaluateSettings, values, "evaluate")


@pytest.mark.long
def test_our_own_task_runs_offline(tiny_model: Path, folder: Path) -> None:
    """Its accuracy equals that of plain transformers."""
    from nudge.components.common.models.language_model import load_model, load_tokenizer

    check_tasks(settings(folder, "capitals", {"name": "capitals", "examples": 1}))
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    measured = run_tasks(model, tokenizer, settings(folder, "capitals"))["capitals"]
    right = 0
    for question, choices, answer in QUESTIONS:
        likely = []
        for choice in choices:
            start, ids = tokenizer(question)["input_ids"], tokenizer(question + choice)["input_ids"]
            rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            positions = range(len(start), len(ids))
            likely.append(sum(rows[position - 1, ids[position]].item() for position in positions))
        right += likely.index(max(likely)) == answer
    assert measured.metric == "acc"
    assert measured.value == pytest.approx(right / 2)
    assert measured.higher_is_better
    assert measured.examples == 6
    few = run_tasks(model, tokenizer, settings(folder, {"name": "capitals", "examples": 1}))
    assert few["capitals"].examples == 1
    with pytest.raises(UserError, match="no task 'capitls'; did you mean 'capitals'"):
        check_tasks(settings(folder, "capitls"))
    (folder / "capitals.jsonl").unlink()
    with pytest.raises(UserError, match="capitals failed"):
        run_tasks(model, tokenizer, settings(folder, "capitals"))


@pytest.mark.parametrize(
    ("old", "new", "higher", "limit", "ok"),
    [
        (0.6, 0.59, True, 0.02, True),
        (0.6, 0.57, True, 0.02, False),
        (0.6, 0.1, True, None, True),
        (9.0, 9.5, False, 0.2, False),
        (9.0, 8.0, False, 0.2, True),
        (0.6, float("nan"), True, 0.02, False),
    ],
)
def test_a_task_may_get_worse_by_its_limit(
    old: float, new: float, higher: bool, limit: float | None, ok: bool
) -> None:
    asked = settings("", {"name": "quiz", "limit": limit})
    measured = {
        name: {"quiz": Measured("acc", value, 0.01, higher, 100)}
        for name, value in {"incumbent": old, "candidate": new}.items()
    }
    tasks = compare_tasks(asked, measured, "incumbent")
    assert tasks[0].ok == ok
    checks = task_checks(tasks)
    assert [check.ok for check in checks] == ([] if limit is None else [ok])


def test_without_the_harness_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    check_tasks(settings(""))
    with pytest.raises(UserError, match=r"pip install 'nudge-lm\[tasks\]'"):
        check_tasks(settings("", "arc_easy"))


def test_a_missing_task_folder_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra tasks is not installed")
    for uri in (str(tmp_path / "none"), "s3://bucket/tasks"):
        with pytest.raises(UserError, match="not a folder on this machine"):
            check_tasks(settings(uri, "arc_easy"))
