"""`nudge trace` and `ingest.forget`: what learned a document, and how it stays out."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nudge.components.common.artifacts.corpus import read_corpus, read_documents, text_sha256
from nudge.components.common.core.errors import UserError
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import retention, tracing
from tests.pipelines.finished_run import finished_run

SECRET = "Wally was seen on the old bridge at noon, with a red scarf and a walking stick."
COPY = SECRET.replace("noon", "noon today")
"""A near duplicate of the secret: all but one of its word 5-grams around the change are shared."""
LONG = " ".join(f"He walked past house number {n} and greeted its owner." for n in range(40))


def nudge(*arguments: object, status: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


def write(folder: Path, extra: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    texts = [f"Document {n} is about river {n * 7} and its long bridge." for n in range(60)]
    rows = [{"id": f"d{n}", "text": text} for n, text in enumerate([*texts, *extra])]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(folder: Path, into: Path, **changes: Any) -> dict[str, str]:
    """The texts that ingest keeps, by id."""
    settings = IngestSettings(
        data_uri=(str(folder),), validation_share=0.2, workers=1, **{"max_lost": 1, **changes}
    )
    ingest(settings, corpus=into, report=into.with_suffix(".html"))
    return {
        each.id: each.text
        for split in ("train", "validation")
        for each in read_documents(into, split)
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def with_corpus(home: Path, folder: Path, base: str, weights: str) -> str:
    """A finished run that read this folder; returns its id."""
    run = finished_run(home)
    corpus = run.folder / "artifacts" / "ingest" / "corpus"
    read(folder, corpus)
    lines = [json.loads(line) for line in run.events.read_text().splitlines()]
    for line in lines:
        if line["event"] == "step_end" and line["step"] == "ingest":
            line["outputs"]["corpus"] = str(corpus)
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"base_model": {"sha256": base}, "weights_sha256": weights}
    (run.folder / "artifacts" / "train" / "model" / "nudge.json").write_text(json.dumps(facts))
    return run.run_id


def test_a_document_is_traced_by_file_id_digest_and_text(home: Path, tmp_path: Path) -> None:
    with_it = with_corpus(home, write(tmp_path / "with", [SECRET]), "base", "w1")
    with_corpus(home, write(tmp_path / "without", []), "base", "w2")
    later = with_corpus(home, write(tmp_path / "without", []), "w1", "w3")
    letter = tmp_path / "letter.txt"
    letter.write_text(SECRET + "\n")
    digest = text_sha256(SECRET)
    for document in (letter, "d60", f"sha256:{digest[:12]}", digest, SECRET, SECRET[10:50]):
        rows = json.loads(nudge("trace", document, "--json").stdout)
        assert [row["run_id"] for row in rows] == [with_it, later], document
        assert {row["sha256"] for row in rows} == {digest}
        assert rows[1]["through"] == with_it
        assert (
            rows[0]["corpus"]
            == read_corpus(home / "runs" / with_it / "artifacts" / "ingest" / "corpus").fingerprint
        )
    assert json.loads(nudge("trace", "Wally", "--json", status=1).stdout) == []
    shown = nudge("trace", letter).stdout
    assert f"ingest.forget=[sha256:{digest[:16]}]" in shown or "validation" in shown


def test_a_text_longer_than_a_file_name_is_traced(home: Path, tmp_path: Path) -> None:
    run_id = with_corpus(home, write(tmp_path / "with", [LONG]), "base", "w1")
    assert len(LONG) > 255
    (found,) = json.loads(nudge("trace", LONG, "--json").stdout)
    assert found["run_id"] == run_id


def test_a_file_of_many_documents_takes_a_row_for_each_run_and_split(
    home: Path, tmp_path: Path
) -> None:
    folder = write(tmp_path / "with", [])
    run_id = with_corpus(home, folder, "base", "w1")
    shown = nudge("trace", folder / "a.jsonl").stdout
    rows = [line for line in shown.splitlines() if line.startswith("│ 20")]
    assert len(rows) == 2, shown  # train and validation
    source = (folder / "a.jsonl").as_uri()
    assert f"ingest.forget: [{source}]" in shown
    assert run_id in shown
    assert "documents of" in shown
    with pytest.raises(UserError, match="forgotten 60"):
        read(folder, tmp_path / "kept", forget=(source,))


def test_a_conversation_is_traced_by_its_file(home: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": " Hello? "}, {"role": "assistant", "content": SECRET}]
    row = json.dumps({"messages": turns}) + "\n"
    folder = write(tmp_path / "with", [])
    (folder / "chat.jsonl").write_text(row)
    run_id = with_corpus(home, folder, "base", "w1")
    copied = tmp_path / "copy.jsonl"
    copied.write_text(row)
    (found,) = json.loads(nudge("trace", copied, "--json").stdout)
    assert (found["run_id"], found["source"]) == (run_id, (folder / "chat.jsonl").as_uri())


def test_the_trace_outlives_the_artifacts(home: Path, tmp_path: Path) -> None:
    run_id = with_corpus(home, write(tmp_path / "with", [SECRET]), "base", "w1")
    later = with_corpus(home, write(tmp_path / "without", []), "w1", "w3")
    before = tracing.trace(home, tracing.wanted("d60"))
    rules = retention.Rules(days=0, runs=0, reuse=0)
    done = retention.apply(home, rules)
    assert {each.kind for each in done.removals} >= {"artifacts of a run"}
    assert not (home / "runs" / run_id / "artifacts").exists()
    assert tracing.trace(home, tracing.wanted("d60")) == before
    assert [row.run_id for row in before] == [run_id, later]
    (home / "runs" / run_id / tracing.FINGERPRINTS).write_bytes(b"\0" * 20)
    assert "is damaged" in nudge("trace", "d60", status=2).stderr


@pytest.mark.parametrize("entry", ["digest", "id:d60", "a.jsonl"])
def test_forget_keeps_a_document_out(entry: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "texts", [SECRET])
    (folder / "b.jsonl").write_text(
        "".join(json.dumps({"id": f"b{n}", "text": f"Note {n}: rain."}) + "\n" for n in range(40))
    )
    given = f"sha256:{text_sha256(SECRET)[:16]}" if entry == "digest" else entry
    kept = read(folder, tmp_path / "corpus", forget=(given,), min_characters=5)
    assert SECRET not in kept.values()
    dropped = read_corpus(tmp_path / "corpus").dropped
    assert dropped["forgotten"] == (61 if entry == "a.jsonl" else 1)
    assert len(kept) == 101 - dropped["forgotten"] - dropped.get("near_duplicate", 0)


def test_copies_and_near_duplicates_of_a_forgotten_document_stay_out(tmp_path: Path) -> None:
    first, near = f"{LONG} {SECRET}", f"{LONG} {COPY}"
    folder = write(tmp_path / "texts", [first, first, near])
    kept = read(folder, tmp_path / "corpus")
    assert len({first, near} & set(kept.values())) == 1
    digest = f"sha256:{text_sha256(first)}"
    kept = read(folder, tmp_path / "corpus2", forget=(digest,))
    assert not {first, near} & set(kept.values())
    kept = read(folder, tmp_path / "corpus3", forget=(digest,), near_duplicates=False)
    assert near in kept.values()
    assert first not in kept.values()


def test_forget_reaches_documents_of_the_incremental_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, state = write(tmp_path / "texts", [SECRET]), str(tmp_path / "state")
    assert SECRET in read(folder, tmp_path / "c1", state_uri=state).values()
    forget = (f"sha256:{text_sha256(SECRET)}", "id:no-such")
    kept = read(folder, tmp_path / "c2", state_uri=state, forget=forget)
    assert SECRET not in kept.values()
    assert "no document fits id:no-such" in capsys.readouterr().err
    assert SECRET in read(folder, tmp_path / "c3", state_uri=state).values()
    alone = read(folder, tmp_path / "c4", forget=forget)
    assert kept == alone
    first, second = (read_corpus(tmp_path / name).fingerprint for name in ("c2", "c4"))
    assert first == second
