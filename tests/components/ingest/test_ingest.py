"""Ingest: every format, exact counts, a stable split, clear errors."""

import gzip
import json
import os
import signal
from pathlib import Path

import pytest

from nudge.components.common.artifacts.corpus import read_corpus, read_documents, zstd
from nudge.components.common.artifacts.schema import plain
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.ingest import cleaning
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from tests.components.ingest.splits import split_of


def texts(count: int) -> list[str]:
    return [f"Document number {n} about {n * n} things, shown at length {n}." for n in range(count)]


def write(folder: Path, documents: list[str], name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def run(folder: Path, uri: str, **values: object) -> dict[str, object]:
    settings = IngestSettings(data_uri=uri, **values)  # type: ignore[arg-type]
    return ingest(settings, corpus=folder / "corpus", report=folder / "report.html")


def test_counts_reconcile_and_drops_have_reasons(tmp_path: Path) -> None:
    path = write(tmp_path, [*texts(40), texts(1)[0], "short"])
    with path.open("ab") as file:
        file.write(b'{"text": 3}\nnot json\n{"text": "\xff\xfe bad"}\n')
    run(tmp_path, str(path))
    manifest = plain(read_corpus(tmp_path / "corpus"))
    dropped = manifest["dropped"]
    assert dropped == {"bad_record": 1, "duplicate": 1, "no_text": 1, "not_utf8": 1, "too_short": 1}
    assert manifest["documents_in"] == manifest["documents"] + sum(dropped.values()) == 45
    kept = [d for s in ("train", "validation") for d in read_documents(tmp_path / "corpus", s)]
    assert sorted(d.text for d in kept) == sorted(texts(40))


def test_gz_zst_csv_txt_and_a_literal_module_are_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(40)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[: len(lines) // 2]))
    middle = len(lines) // 2
    frames = [zstd.compress(lines[:middle]), zstd.compress(lines[middle:])]  # as pzstd writes
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "c.csv").write_text("id,text\n1,A comma separated document that is new.\n")
    (tmp_path / "d.txt").write_text("A whole file that is one document of its own.")
    (tmp_path / "e.py").write_text("topics = {'x': 'A text inside a literal mapping, not run.'}")
    (tmp_path / "f.NDJSON").write_text('{"text": "A line of JSON under its other name."}')
    (tmp_path / "g.TXT.GZ").write_bytes(gzip.compress(b"A suffix in capital letters is one too."))
    result = run(tmp_path, f"file://{tmp_path}")
    assert result["documents"] == 45


def test_near_duplicates_are_dropped(tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(200))
    result = run(tmp_path, str(write(tmp_path, [*texts(40), long, long + " end"])))
    assert result["documents"] == 41
    assert read_corpus(tmp_path / "corpus").dropped == {"near_duplicate": 1}


def test_the_fingerprint_ignores_the_order_and_the_split_is_stable(tmp_path: Path) -> None:
    first = run(tmp_path, str(write(tmp_path, texts(40))))
    turned = run(tmp_path, str(write(tmp_path, texts(40)[::-1], "b.jsonl")))
    assert first["fingerprint"] == turned["fingerprint"]
    before = {d.text for d in read_documents(tmp_path / "corpus", "validation")}
    run(tmp_path, str(write(tmp_path, texts(80), "c.jsonl")))
    assert before <= {d.text for d in read_documents(tmp_path / "corpus", "validation")}
    settings = IngestSettings(data_uri="x")
    assert all(split_of(text, settings) == "validation" for text in before)


def test_the_seed_of_training_does_not_change_the_split(tmp_path: Path) -> None:
    recipe = f"seed: %d\ningest: {{data_uri: {write(tmp_path, texts(60))}}}"
    held_out = []
    for seed, given in ((1, {}), (2, {}), (2, {"split_seed": 2})):
        settings = step_settings(IngestSettings, "ingest", recipe % seed, **given)
        ingest(settings, corpus=tmp_path / "corpus", report=tmp_path / "report.html")
        held_out.append({d.text for d in read_documents(tmp_path / "corpus", "validation")})
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the corpus is empty"),
        ('{"text": "tiny"}\n', "no document is left of 1; dropped: too_short 1"),
        ('{"text": "The only document that there is."}\n', "too small to split"),
        ('{"text": "One that is there twice."}\n' * 9, "too small to split"),
        ('{"body": "x"}\n', "no column 'text'; it has: body"),
    ],
)
def test_unusable_data_ends_with_a_clear_message_and_no_output(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path, str(tmp_path / "a.jsonl"))
    assert not (tmp_path / "corpus").exists()


def test_missing_and_unknown_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\*.*no file found"):
        run(tmp_path, str(tmp_path / "nothing*"))
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match=r"unknown kind of file; accepted are .*\.jsonl"):
        run(tmp_path, str(tmp_path / "a.doc"))
    with pytest.raises(UserError, match="'nowhere_at_all' is not installed"):
        run(tmp_path, "package://nowhere_at_all/x.txt")


def test_the_number_of_processes_does_not_change_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write(
            tmp_path,
            [*texts(200), "short", f"Only in file {number}, said once."],
            f"{number}.jsonl",
        )
    made = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        run(folder, f"{tmp_path}/*.jsonl", workers=workers)
        made.append([(p.name, p.read_bytes()) for p in sorted((folder / "corpus").iterdir())])
        # From here on, other processes do all cleaning, and batches end within files.
        monkeypatch.setattr(cleaning, "ALONE_BYTES", 0)
        monkeypatch.setattr(cleaning, "BATCH_BYTES", 1000)
    assert made[0] == made[1]


def test_pages_are_parsed_in_the_processes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, text in enumerate(texts(40)):
        page = f"<html><body><nav>menu</nav><article><p>{text * 5}</p></article></body></html>"
        (tmp_path / f"{number}.html").write_text(page)
    run(tmp_path / "alone", str(tmp_path / "*.html"), workers=1)
    monkeypatch.setattr(cleaning, "ALONE_BYTES", 0)
    monkeypatch.setattr("trafilatura.extract", lambda _: pytest.fail("by this process"))
    run(tmp_path / "shared", str(tmp_path / "*.html"), workers=2)
    manifests = [plain(read_corpus(tmp_path / name / "corpus")) for name in ("alone", "shared")]
    assert manifests[0] == manifests[1]
    assert manifests[0]["documents"] == 40


def killed(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "ALONE_BYTES", 0)
    monkeypatch.setattr(cleaning, "_clean_batch", killed)
    path = write(tmp_path, texts(20))
    with pytest.raises(UserError, match="one of the 2 cleaning processes was killed"):
        run(tmp_path, str(path), workers=2)
    assert not (tmp_path / "corpus").exists()
