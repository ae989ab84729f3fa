"""The step by itself: its outputs, and that its metrics can be recomputed from them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from nudge.components.common.artifacts.evaluation import Incumbent
from nudge.components.common.artifacts.scores import read_scores
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.common.core.settings import parse
from nudge.components.common.models.base_model import model_sha256
from nudge.components.common.models.loading import meta_model, model_config
from nudge.components.common.models.serving_quantization import quantize_folder
from nudge.components.evaluate.settings import EvaluateSettings, Guard, Probe
from tests.components.evaluate.workspace import (
    HELD_OUT,
    Say,
    Workspace,
    make_corpus,
    sentences,
    train,
)

pytestmark = pytest.mark.usefixtures("served_is")

FEW = {"max_documents": 15}


def test_the_interval_can_be_recomputed_from_the_scores(
    workspace: Workspace, served_is: Say
) -> None:
    """With only pyarrow and numpy, against base and incumbent."""
    served = workspace.folder / "served"
    shutil.copytree(workspace.folder / "candidate", served)
    train(served, sentences(7, 3))
    served_is(Incumbent("found", version="v1", uri="s3://bucket/m/v1"), served)
    result = workspace.run(resamples=9999)
    table = pyarrow.parquet.read_table(workspace.folder / "scores").to_pylist()
    assert len(table) == result["scores"]["rows"] == 3 * HELD_OUT
    columns = {
        name: {row["document"]: row for row in table if row["model"] == name}
        for name in ("base", "incumbent", "candidate")
    }
    assert all(columns["base"][n]["id"].startswith("validation-") for n in range(HELD_OUT))
    for reference in ("base", "incumbent"):
        new, old = columns["candidate"], columns[reference]
        nats = np.array([new[n]["nats"] - old[n]["nats"] for n in range(HELD_OUT)])
        size = np.array([old[n]["bytes"] for n in range(HELD_OUT)])

        def difference(gain: Any, size: Any) -> Any:
            return gain.sum(axis=-1) / size.sum(axis=-1) / math.log(2)

        # The percentile bootstrap (Efron and Tibshirani 1993, 13.3), documents drawn in pairs.
        drawn = np.random.default_rng(5).integers(len(size), size=(20_000, len(size)))
        low, high = np.percentile(difference(nats[drawn], size[drawn]), [2.5, 97.5])
        compared = result["verdict"]["comparisons"][reference]
        assert compared["difference_bits_per_byte"] == pytest.approx(difference(nats, size))
        assert compared["interval"] == pytest.approx([low, high], abs=0.05 * (high - low))
    assert result["verdict"]["reference"] == "incumbent"


def test_a_probe_that_should_hold_is_compared_with_the_version_served_now(
    workspace: Workspace, served_is: Say
) -> None:
    """That version is the candidate itself, which is far from the base model."""
    served_is(
        Incumbent("found", version="v7", uri="s3://bucket/m/v7"), workspace.folder / "candidate"
    )
    (hold, rise) = workspace.run(
        probes=[
            Probe(prompt="the tower", target=" of", expect="hold"),
            Probe(prompt="a river", target=" and"),
        ]
    )["probes"]
    assert (hold["reference"], hold["ok"]) == ("incumbent", True)
    assert hold["p_before"] == hold["p_after"]
    assert (rise["reference"], rise["p_before"] < rise["p_after"]) == ("base", True)
    page = (workspace.folder / "report").read_text()
    assert "Served now (v7) → candidate; 1 is certain" in page
    assert "before (served now)" in page
    assert "before (base)" in page


def test_changed_scores_are_rejected(workspace: Workspace) -> None:
    sha256 = workspace.run()["scores"]["sha256"]
    path = workspace.folder / "scores"
    assert set(read_scores(path, sha256)) == {"held-out"}
    assert len(read_scores(path)["held-out"]["candidate"]) == HELD_OUT
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match="is damaged: sha256"):
        read_scores(path, sha256)
    path.write_text("no table")
    with pytest.raises(UserError, match="is not a nudge.scores file"):
        read_scores(path)


def test_the_method_is_recorded(workspace: Workspace) -> None:
    result = workspace.run(
        probes=[Probe(prompt="the tower of", target=" Paris")], prompts=["the tower of"]
    )
    assert result["verdict"]["promote"], result["verdict"]["reason"]
    assert result["models"]["base"]["first_token"] == "<|endoftext|>"
    assert result["models"]["candidate"]["sha256"] != result["models"]["base"]["sha256"]
    method = result["method"]
    assert (method["window"], method["stride"], method["first_token"]) == (64, 32, "auto")
    assert (method["device"], method["precision"]) == ("CPU", "float32")
    assert len(method["texts_sha256"]["held-out"]) == 64
    assert [check["kind"] for check in result["verdict"]["checks"]] == ["loss", "completion"]
    other = workspace.run(first_token="none")
    assert other["models"]["base"]["first_token"] is None
    assert other["metrics"]["base"]["tokens"] == result["metrics"]["base"]["tokens"] - HELD_OUT
    assert other["metrics"]["base"]["bytes"] == result["metrics"]["base"]["bytes"]


def test_a_guard_set_is_scored_and_stops_the_promotion(
    workspace: Workspace, tmp_path: Path
) -> None:
    """The candidate learned words and got worse on digits."""
    generator = np.random.default_rng(3)
    numbers = [" ".join(map(str, generator.integers(0, 999, 20))) for _ in range(20)]
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in numbers))
    guard: dict[str, Any] = {"name": "numbers", "uri": f"file://{path}"}
    result = workspace.run(guards=[Guard(**guard, limit=0.0)])
    (guarded,) = result["guards"]
    assert guarded["metrics"]["base"]["documents"] == 20
    assert guarded["interval"][1] > 0
    assert not result["verdict"]["promote"]
    assert "bits per byte on numbers" in result["verdict"]["reason"]
    assert set(read_scores(workspace.folder / "scores")) == {"held-out", "numbers"}
    assert workspace.run(guards=[Guard(**guard, limit=99.0)])["verdict"]["promote"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("one.txt", b"a single text", "has 1 documents with text; fewer than 16 cannot show"),
        ("bad.jsonl", b'{"text": 1}\n', "bad.jsonl, row 1 of .* cannot be read: no_text"),
        ("bad.jsonl", b"{", r"cannot be read: bad_record \(line 1\); use UTF-8 text, JSON lines"),
        ("bad.txt", b"\xff\xfe", "cannot be read"),
        ("bad.jsonl.gz", b"no gzip", "cannot be read"),
    ],
)
def test_unreadable_guards_are_rejected(
    workspace: Workspace, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"evaluate.guards code: .*{message}"):
        workspace.run(guards=[Guard(name="code", uri=str(tmp_path / name))])


def test_missing_guards_and_duplicate_names_are_rejected(
    workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has 0 documents"):
        workspace.run(guards=[Guard(name="code", uri=str(tmp_path / "nothing" / "*.py"))])
    with pytest.raises(UserError, match="cannot read ftp://x"):
        workspace.run(guards=[Guard(name="code", uri="ftp://x")])
    with pytest.raises(ValueError, match="two guards are named code"):
        workspace.run(guards=[Guard(name="code", uri="a"), Guard(name="code", uri="b")])


def test_too_few_held_out_documents_stop_the_promotion(workspace: Workspace) -> None:
    """Even if the candidate is better on each of them."""
    make_corpus(workspace.folder / "few", sentences(1, 3), sentences(2, MIN_DOCUMENTS - 1))
    result = workspace.run(corpus="few")
    verdict = result["verdict"]
    assert verdict["difference_bits_per_byte"] < 0
    assert (verdict["promote"], verdict["interval"]) == (False, None)
    assert "only 15 held-out documents were scored, and with fewer than 16" in verdict["reason"]
    assert "or raise ingest.validation_share" in verdict["reason"]
    page = (workspace.folder / "report").read_text()
    assert "These held-out documents give no interval" in page
    assert "% interval" not in page
    make_corpus(workspace.folder / "enough", sentences(1, 3), sentences(2, MIN_DOCUMENTS))
    assert workspace.run(corpus="enough")["verdict"]["promote"]


def chosen_by(workspace: Workspace, documents: list[int], data_fingerprint: str = "") -> str:
    """A copy of the candidate whose checkpoint was chosen by the documents at these positions."""
    folder = workspace.folder / f"chosen-by-{len(documents)}-{data_fingerprint}"
    shutil.copytree(workspace.folder / "candidate", folder)
    facts = json.loads((folder / "nudge.json").read_text()) | {"selected_on": documents}
    facts["data_fingerprint"] = data_fingerprint or facts["data_fingerprint"]
    (folder / "nudge.json").write_text(json.dumps(facts))
    return folder.name


def test_documents_that_chose_the_checkpoint_are_not_scored(workspace: Workspace) -> None:
    workspace.run()
    ids = {row["document"]: row["id"] for row in scores_of(workspace)}
    result = workspace.run(chosen_by(workspace, [0, 3, 19]))
    left = {row["id"] for row in scores_of(workspace)}
    assert left == set(ids.values()) - {ids[0], ids[3], ids[19]}
    assert result["selection"] == {"documents": 3, "scored": False}
    assert result["verdict"]["promote"]
    assert "chosen" not in result["verdict"]["reason"]
    assert (
        "The 3 held-out documents that chose the checkpoint"
        in (workspace.folder / "report").read_text()
    )
    # The positions belong to the training corpus and mean nothing in another one.
    other = workspace.run(chosen_by(workspace, [0, 3, 19], "another"))
    assert other["metrics"]["candidate"]["documents"] == HELD_OUT


def test_with_too_few_other_documents_the_verdict_names_the_selection(workspace: Workspace) -> None:
    result = workspace.run(chosen_by(workspace, [0, 3, 7, 11, 19]))
    assert result["metrics"]["candidate"]["documents"] == HELD_OUT
    assert result["selection"] == {"documents": 5, "scored": True}
    assert result["verdict"]["promote"]
    assert result["verdict"]["reason"].endswith("so part of the gain comes from that choice")
    assert (
        "part of the gain comes from that choice, and equal models"
        in (workspace.folder / "report").read_text()
    )


def scores_of(workspace: Workspace) -> list[dict[str, Any]]:
    return list(pyarrow.parquet.read_table(workspace.folder / "scores").to_pylist())


def test_settings_that_score_too_few_documents_are_rejected() -> None:
    for section in ({"max_documents": 15}, {"guards": [{"name": "x", "uri": "y", **FEW}]}):
        with pytest.raises(UserError, match="max_documents = 15: input should be greater .* to 16"):
            parse(EvaluateSettings, {"base_model": "unused", **section}, "evaluate")


def test_a_candidate_with_nan_weights_is_not_promoted(workspace: Workspace) -> None:
    """The artifact stays strict JSON, and the reason names the fault."""
    broken = workspace.folder / "broken"
    shutil.copytree(workspace.folder / "candidate", broken)
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    result = workspace.run("broken", prompts=["the tower"])
    assert not result["verdict"]["promote"]
    assert f"the loss of {HELD_OUT} documents of held-out is not a" in result["verdict"]["reason"]
    assert result["metrics"]["candidate"]["bits_per_byte"] is None
    assert "NaN" not in (workspace.folder / "evaluation").read_text()
    assert "not available" in (workspace.folder / "report").read_text()


def test_text_without_spaces_has_no_word_perplexity(workspace: Workspace) -> None:
    """As in Thai. The artifact stays strict JSON, and the page leaves the row out."""
    letters = [chr(code) for code in range(0x0E01, 0x0E2F)]
    generator = np.random.default_rng(4)
    texts = ["".join(generator.choice(letters, 300)) for _ in range(HELD_OUT)]
    make_corpus(workspace.folder / "thai", texts[:1], texts)
    result = workspace.run(corpus="thai")
    assert result["metrics"]["base"]["words"] is None
    assert result["metrics"]["base"]["word_perplexity"] is None
    assert result["metrics"]["base"]["token_perplexity"] > 1
    assert "Infinity" not in (workspace.folder / "evaluation").read_text()
    page = (workspace.folder / "report").read_text()
    assert "Word perplexity" not in page
    assert "20 documents, " in page
    assert " words" not in page[page.index("Scored:") :].split("</p>")[0]


def test_quantized_models_are_scored_as_they_are_served(
    workspace: Workspace, served_is: Say
) -> None:
    plain = workspace.run()
    for name, kind in {"eight": "int8", "four": "int4"}.items():
        folder = workspace.folder / name
        shutil.copytree(workspace.folder / "candidate", folder)
        quantize_folder(folder, meta_model(model_config(folder)), kind)  # type: ignore[arg-type]
    served_is(Incumbent("found", version="v1", uri="s3://bucket/m/v1"), workspace.folder / "four")
    result = workspace.run(candidate="eight")
    assert result["incumbent"]["state"] == "found", result["incumbent"]
    found = {name: each["bits_per_byte"] for name, each in result["metrics"].items()}
    exact = plain["metrics"]["candidate"]["bits_per_byte"]
    assert found["base"] == plain["metrics"]["base"]["bits_per_byte"]
    for name in ("candidate", "incumbent"):
        assert 1e-6 < abs(found[name] - exact) < 0.05
    assert found["candidate"] != found["incumbent"]
    assert result["models"]["candidate"]["sha256"] == model_sha256(workspace.folder / "eight")
