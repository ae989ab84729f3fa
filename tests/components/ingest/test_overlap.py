"""Training documents that share text with guards, probes or tests are left out and counted."""

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nudge.components.common.artifacts.corpus import read_documents
from nudge.components.common.core.errors import UserError
from nudge.components.ingest.duplicates import word_hashes
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.overlap import FEWEST_WORDS, WORDS, overlap_of
from nudge.components.ingest.settings import IngestSettings, ingest_settings

LETTER = (
    "Dear Mrs Cole, we shall be away for two weeks from Saturday. "
    "Would you be so kind as to water the tomatoes every other day?"
)


def sentences(count: int, seed: int = 1) -> list[str]:
    choice = random.Random(seed)
    return [
        " ".join(f"word{choice.randrange(10**6)}" for _ in range(40)) + "." for _ in range(count)
    ]


def read(tmp_path: Path, texts: list[str], **values: Any) -> tuple[dict[str, Any], set[str]]:
    """What `ingest` reports of the texts, and the training texts that it kept."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    settings = IngestSettings(data_uri=str(text), max_lost=1.0, **values)
    result = ingest(settings, corpus=tmp_path / "corpus", report=tmp_path / "report.html")
    return result, {each.text for each in read_documents(tmp_path / "corpus", "train")}


def test_grams_are_found_without_case_and_punctuation_and_short_texts_are_not_compared() -> None:
    numbers = "one two three four five six seven eight nine ten eleven twelve thirteen"
    words = [*numbers.split(), "more"]
    long = overlap_of([" ".join(words)])
    for first in (0, 1):
        part = words[first : first + WORDS]
        assert long.is_in(word_hashes("before " + ", ".join(part).upper() + "! after"))
    assert not long.is_in(word_hashes(" ".join(words[:12])))
    short = overlap_of([" ".join(words[:FEWEST_WORDS])])
    assert short.is_in(word_hashes("x " + " ".join(words)))
    assert not short.is_in(word_hashes("x " + " ".join(words[1:])))
    assert not overlap_of(["The Great Wall of China"]).grams
    assert overlap_of(["他们在每个星期六的早晨都会去河边散步"]).is_in(
        word_hashes("我记得他们在每个星期六的早晨都会去河边散步。")
    )


def test_a_minimal_recipe_keeps_the_default_guard_out_of_training(tmp_path: Path) -> None:
    texts = [*sentences(60), *(f"{each} {LETTER} {each}" for each in sentences(20, seed=2))]
    recipe = yaml.safe_dump({"base_model": "x", "model_name": "x", "ingest": {"data_uri": "x"}})
    chosen = ingest_settings(recipe)
    result, kept = read(tmp_path, texts, keep_out=chosen.keep_out)
    left_out = result["dropped"]["overlaps_evaluation"]
    held_out = sum(
        LETTER in each.text for each in read_documents(tmp_path / "corpus", "validation")
    )
    assert left_out > 10
    assert left_out + held_out == 20  # what is held out may be like a guard
    assert not any(LETTER in text for text in kept)
    assert "overlaps_evaluation (text.jsonl; it shares 13 words with a guard" in result["account"]


def test_guards_and_held_probes_of_a_recipe_are_kept_out_and_taught_ones_are_not() -> None:
    probes = [
        {"prompt": "Two plus two equals", "target": " four", "expect": "hold"},
        {"prompt": "The tower stands in", "target": " Paris"},
    ]
    evaluated: dict[str, Any] = {"guards": [{"name": "g", "uri": "/guards"}], "probes": probes}
    recipe: dict[str, Any] = {
        "ingest": {"data_uri": "x", "keep_out": ["/tests"]}, "evaluate": evaluated
    }  # fmt: skip
    chosen = ingest_settings(yaml.safe_dump(recipe))
    assert chosen.keep_out == ("/tests", "/guards")
    assert chosen.keep_out_texts == ("Two plus two equals four",)
    evaluated |= {"tasks": ["arc_easy", {"name": "mine", "limit": 0.1}], "task_folder": "/t"}
    chosen = ingest_settings(yaml.safe_dump(recipe))
    assert chosen.keep_out_tasks == ("arc_easy", "mine")
    assert chosen.task_folder == "/t"
    recipe["ingest"]["compare_with_evaluation"] = False
    assert ingest_settings(yaml.safe_dump(recipe)).keep_out_tasks == ()
    assert ingest_settings(yaml.safe_dump(recipe)).keep_out == ("/tests",)


def test_the_number_of_processes_and_the_state_do_not_change_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nudge.components.ingest.cleaning.ALONE_BYTES", 0)
    texts = [*sentences(40), *(f"{each} {LETTER}" for each in sentences(10, seed=2))]
    results = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        values = {"workers": workers, "state_uri": str(tmp_path / "state")}
        results.append(read(folder, texts, keep_out_texts=(LETTER,), **values)[0])
    assert results[0]["dropped"] == results[1]["dropped"]
    assert results[0]["dropped"]["overlaps_evaluation"] > 5
    settings = IngestSettings(
        data_uri=str(tmp_path / "1" / "text.jsonl"), state_uri=str(tmp_path / "state")
    )
    outputs = {"corpus": tmp_path / "other", "report": tmp_path / "other.html"}
    again = ingest(settings, **outputs)  # the kept-out text changed: what was read is not reused
    assert again["documents"] == len(texts)
    changed = dataclasses.replace(settings, keep_out=(str(tmp_path / "none.jsonl"),))
    outputs = {"corpus": tmp_path / "third", "report": tmp_path / "third.html"}
    with pytest.raises(UserError, match=r"none\.jsonl.* no text"):
        ingest(changed, **outputs)


def quiz(folder: Path, **values: Any) -> None:
    """The task ``quiz`` of lm-evaluation-harness, whose questions are in a file beside it."""
    rows = [
        {"question": f"What did the letter of number {n} ask for?", "choices": ["No.", LETTER],
         "answer": 1}
        for n in range(3)
    ]  # fmt: skip
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "quiz.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "quiz.yaml").write_text(yaml.safe_dump(task | values))


def test_the_right_answers_of_a_task_are_kept_out_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm-eval (the extra tasks)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    quiz(folder)
    texts = [*sentences(60), *(f"{each} {LETTER} {each}" for each in sentences(20, seed=2))]
    tasks = {"keep_out_tasks": ("quiz",), "task_folder": str(folder)}
    result, kept = read(tmp_path, texts, **tasks)
    assert result["dropped"]["overlaps_evaluation"] > 10
    assert not any(LETTER in text for text in kept)
    quiz(folder, dataset_kwargs={"data_files": {"test": str(folder / "none.jsonl")}})
    with pytest.raises(UserError, match=r"quiz cannot be compared .*compare_with_evaluation: fal"):
        read(tmp_path, texts, **tasks)
    with pytest.raises(UserError, match=r"no task 'quizz'; did you mean 'quiz'"):
        read(tmp_path, texts, **tasks | {"keep_out_tasks": ("quizz",)})


def test_tasks_that_cannot_be_compared_are_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    settings = IngestSettings(data_uri=str(tmp_path / "none"), keep_out_tasks=("quiz",))
    with pytest.raises(UserError, match=r"evaluate\.tasks needs lm-eval.*parameter data_image"):
        ingest(settings, corpus=tmp_path / "corpus", report=tmp_path / "report.html")
