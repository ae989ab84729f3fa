"""Typed artifacts: those of an earlier release load, and reading and writing loses nothing.

``written_by_0_1`` is the output of ingest, tokenize, train, evaluate and upload of release 0.1.0.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from nudge.components.common.artifacts.corpus import Corpus, Group, read_corpus, read_documents
from nudge.components.common.artifacts.evaluation import (
    Check,
    Evaluation,
    Metrics,
    Verdict,
    read_evaluation,
    write_evaluation,
)
from nudge.components.common.artifacts.model import (
    ModelFacts,
    Watch,
    read_model_facts,
    write_model_facts,
)
from nudge.components.common.artifacts.model_files import (
    Tampered,
    Upload,
    UploadedFile,
    read_upload,
)
from nudge.components.common.artifacts.schema import json_schema, plain, read_artifact
from nudge.components.common.artifacts.scores import read_scores
from nudge.components.common.artifacts.tokens import TokenReader, Tokens, verified_tokenizer
from nudge.components.common.core.errors import UserError

OLD = Path(__file__).parent / "written_by_0_1"
SAMPLE = Path(__file__).parents[2] / "evaluate" / "sample_evaluation.json"
FILES: list[tuple[Path, Any]] = [
    (OLD / "corpus" / "manifest.json", Corpus),
    (OLD / "tokens" / "manifest.json", Tokens),
    (OLD / "model" / "nudge.json", ModelFacts),
    (OLD / "evaluation.json", Evaluation),
]


def on_disk(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key not in ("format", "version")}


def check_kept(old: Any, new: Any, where: str = "") -> None:
    """Every key and value of ``old`` is in ``new``, which may have more keys."""
    if isinstance(old, dict):
        for key, value in old.items():
            assert key in new, f"{where}.{key}"
            check_kept(value, new[key], f"{where}.{key}")
    elif isinstance(old, list):
        assert len(old) == len(new), where
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            check_kept(one, other, f"{where}.{number}")
    else:
        assert old == new, where


@pytest.mark.parametrize(("path", "kind"), FILES, ids=lambda value: getattr(value, "name", ""))
def test_an_artifact_of_an_earlier_release_keeps_every_key_and_value(path: Path, kind: Any) -> None:
    check_kept(on_disk(path), plain(read_artifact(path, kind)))


def test_an_evaluation_with_all_parts_keeps_every_key_and_value() -> None:
    check_kept(on_disk(SAMPLE), plain(read_artifact(SAMPLE, Evaluation)))


def test_the_data_of_an_earlier_release_can_be_read() -> None:
    manifest = read_corpus(OLD / "corpus")
    texts = [document.text for document in read_documents(OLD / "corpus", "train")]
    assert len(texts) == manifest.train_documents == manifest.splits["train"].documents
    reader = TokenReader(OLD / "tokens", "train")
    assert (reader.documents, reader.tokens) == (len(texts), 18526)
    assert verified_tokenizer(OLD / "tokens").is_dir()
    evaluation = read_evaluation(OLD / "evaluation.json")
    assert evaluation.scores is not None
    scores = read_scores(OLD / "scores", evaluation.scores.sha256)
    assert set(scores) == {"held-out", "more"}
    assert set(scores["more"]) == set(evaluation.metrics) == {"base", "candidate"}
    facts = read_model_facts(OLD / "model")
    assert facts.watch == Watch(prompt="The Eiffel Tower is located in", target=" Paris")
    assert facts.training.steps == 4


def test_an_upload_of_an_earlier_release_has_no_names() -> None:
    body = (OLD / "upload" / "manifest.json").read_bytes()
    upload = read_upload(body)
    assert (upload.model, upload.model_version) == ("", "")
    assert upload.files["model.safetensors"].bytes
    assert upload.to_json() == body


def test_an_upload_with_more_keys_is_read_and_one_without_files_is_not() -> None:
    upload = Upload({"a": UploadedFile("0" * 64, 3)}, "m", "v1")
    values = json.loads(upload.to_json())
    values["files"]["a"]["later"] = values["later"] = 1
    assert read_upload(json.dumps(values).encode()) == upload
    del values["files"]
    with pytest.raises(Tampered, match="cannot be read"):
        read_upload(json.dumps(values).encode())


def test_unknown_keys_are_ignored_at_every_depth(tmp_path: Path) -> None:
    values = json.loads((OLD / "evaluation.json").read_text())
    values["later"] = values["verdict"]["later"] = values["probes"][0]["later"] = {"a": 1}
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    assert read_evaluation(tmp_path / "evaluation.json") == read_evaluation(OLD / "evaluation.json")


def test_a_scores_file_with_another_column_can_be_read(tmp_path: Path) -> None:
    table = pyarrow.parquet.read_table(OLD / "scores")
    pyarrow.parquet.write_table(table.append_column("later", table["bytes"]), tmp_path / "scores")
    assert read_scores(tmp_path / "scores") == read_scores(OLD / "scores")
    pyarrow.parquet.write_table(table.drop_columns(["nats"]), tmp_path / "scores")
    with pytest.raises(UserError, match=r"not a nudge\.scores file of version 1: it has the col"):
        read_scores(tmp_path / "scores")


def test_the_error_names_what_is_missing_or_wrong(tmp_path: Path) -> None:
    values = json.loads((OLD / "model" / "nudge.json").read_text())
    del values["base_model"]["uri"]
    values["seed"] = "first"
    (tmp_path / "nudge.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"base_model\.uri is missing; seed: Input should be a val"):
        read_model_facts(tmp_path)


def test_what_is_written_is_strict_json_under_the_keys_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    verdict = Verdict(
        interval=(float("nan"), 1.0), checks=(Check("loss", "finite", False, "it is NaN"),)
    )
    write_evaluation(
        path,
        Evaluation(verdict=verdict, metrics={"base": Metrics(word_perplexity=float("inf"))}),
    )
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (values["format"], values["version"]) == ("nudge.evaluation", 1)
    assert values["verdict"]["interval"] == [None, 1.0]
    assert values["metrics"]["base"]["word_perplexity"] is None
    assert values["verdict"]["checks"][0]["told"] == "it is NaN"
    read = read_evaluation(path)
    assert read.verdict is not None
    assert read.verdict.interval is not None
    assert read.verdict.interval[1] == 1.0
    assert read.verdict.interval[0] != read.verdict.interval[0]  # NaN


def test_optional_keys_are_left_out_while_they_have_no_value(tmp_path: Path) -> None:
    facts = dataclasses.replace(read_model_facts(OLD / "model"), weights_sha256=None)
    write_model_facts(tmp_path, facts)
    assert "weights_sha256" not in on_disk(tmp_path / "nudge.json")
    assert plain(Group(value=None, documents=1, bytes=2)) == {
        "value": None, "documents": 1, "bytes": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("path", "kind"), FILES, ids=lambda value: getattr(value, "name", ""))
def test_the_schema_describes_the_files(path: Path, kind: Any) -> None:
    schema = json_schema(kind)
    values = json.loads(path.read_text())
    assert values.keys() <= schema["properties"].keys()
    assert set(schema["required"]) <= values.keys()
    assert schema["properties"]["format"]["const"] == values["format"]


def test_reading_needs_neither_torch_nor_kfp() -> None:
    rooms = ("corpus", "tokens", "model", "evaluation", "scores", "model_files", "comparison")
    imports = "; ".join(f"import nudge.components.common.artifacts.{room}" for room in rooms)
    heavy = "{'torch', 'transformers', 'kfp', 'boto3'} & sys.modules.keys()"
    code = f"import sys; {imports}; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
