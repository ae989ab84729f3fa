"""The page and the manifest of a corpus: all counts add up, and hostile text stays text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.corpus import read_corpus, read_documents
from nudge.components.common.artifacts.schema import plain
from nudge.components.common.core.errors import UserError
from nudge.components.ingest import ingest as step
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from tests.pages import browser, look

HOSTILE = "<script>alert(1)</script> </blockquote></details><h1>broken</h1> <img src=x onerror=x>"
WORDS = ["Paris", "Seine", "tower", "bridge", "museum", "river", "garden", "street", "bread"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three files, with licenses and origins, and its report."""
    folder, choice = tmp_path_factory.mktemp("report"), random.Random(1)
    text = folder / "text"
    text.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "id": n,
            "text": f"{n} " + " ".join(choice.choices(WORDS, k=40)) + "\r\n ends é here",
            "license": ["CC-BY-4.0", "CC0-1.0", None][n % 3],
            "from": f"site{n % 5}.example",
        }
        for n in range(60)
    ]
    french = "La tour se dresse au bord du fleuve et se voit de partout dans la ville de Paris."
    rows += [
        {"id": "<b>", "text": HOSTILE, "license": "<i>odd</i>", "from": "a"},
        {"id": "x", "text": french, "license": "CC0-1.0", "from": "b"},
        {**rows[7], "license": "copied", "from": "nowhere"},
        {"id": 5, "text": "short<script>"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "not json\n"
    (text / "<a&b>.jsonl").write_text(lines)
    (text / "b.txt").write_bytes(b"\xff\0 bad")
    (text / "c.txt").write_text("Ã©tÃ© is summer, said over and over by another file.\r\n")
    settings = IngestSettings(
        data_uri=str(text), license_column="license", source_column="from", min_characters=20
    )
    ingest(settings, corpus=folder / "corpus", report=folder / "report.html")
    return folder


def test_documents_and_bytes_reconcile_per_source_and_in_total(made: Path) -> None:
    manifest = plain(read_corpus(made / "corpus"))
    for part in (manifest, *manifest["sources"]):
        dropped = part["dropped"]
        assert part["documents_in"] == part["documents"] + sum(dropped.values())
        assert part["dropped_bytes"].keys() == dropped.keys()
        lost = sum(part["dropped_bytes"].values())
        assert part["text_bytes_in"] == part["text_bytes_kept"] + lost
    for key in ("documents_in", "documents", "text_bytes_in", "text_bytes_kept"):
        assert manifest[key] == sum(source[key] for source in manifest["sources"])
    assert manifest["dropped"] == {"bad_record": 1, "duplicate": 1, "not_utf8": 1, "too_short": 1}
    records = [json.loads(line) for line in (made / "text/<a&b>.jsonl").open() if line[0] == "{"]
    texts = [record["text"].encode() for record in records]
    bad, third = (
        b"\xff\0 bad",
        "Ã©tÃ© is summer, said over and over by another file.\r\n".encode(),
    )
    read = sum(map(len, texts)) + len(b"not json\n") + len(bad) + len(third)
    assert manifest["text_bytes_in"] == read
    assert manifest["dropped_bytes"]["duplicate"] == len(texts[7])
    assert manifest["dropped_bytes"]["not_utf8"] == len(bad)
    kept = [d for split in manifest["splits"] for d in read_documents(made / "corpus", split)]
    assert manifest["bytes"] == sum(len(d.text.encode()) for d in kept)
    assert manifest["bytes"] < manifest["text_bytes_kept"]


def test_licenses_and_origins_are_kept_and_counted(made: Path) -> None:
    manifest = plain(read_corpus(made / "corpus"))
    kept = [d for split in manifest["splits"] for d in read_documents(made / "corpus", split)]
    for key, value_of in (("licenses", "license"), ("origins", "origin")):
        groups = {group["value"]: group for group in manifest[key]}
        found: dict[str | None, list[int]] = {}
        for document in kept:
            sizes = found.setdefault(getattr(document, value_of) or None, [])
            sizes.append(len(document.text.encode()))
        assert {v: (g["documents"], g["bytes"]) for v, g in groups.items()} == {
            value: (len(sizes), sum(sizes)) for value, sizes in found.items()
        }
    assert {g["value"] for g in manifest["licenses"]} == {
        "CC-BY-4.0",
        "CC0-1.0",
        "<i>odd</i>",
        None,
    }


def test_many_origins_are_counted_together(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "GROUPS", 2)
    settings = IngestSettings(data_uri=str(made / "text"), source_column="from")
    ingest(settings, corpus=made / "again", report=made / "again.html")
    assert "6 others" in (made / "again.html").read_text()
    manifest = plain(read_corpus(made / "again"))
    *named, others = manifest["origins"]
    assert len(named) == 2
    assert (others["value"], others["others"]) == (None, 6)
    assert sum(group["documents"] for group in manifest["origins"]) == manifest["documents"]
    assert sum(group["bytes"] for group in manifest["origins"]) == manifest["bytes"]


def test_a_configured_column_that_no_document_has_is_an_error(made: Path) -> None:
    settings = IngestSettings(data_uri=str(made / "text"), license_column="licence")
    with pytest.raises(UserError, match=r"license_column is 'licence', but no document of"):
        ingest(settings, corpus=made / "none", report=made / "none.html")
    assert not (made / "none").exists()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_shows_everything_and_runs_nothing(made: Path, width: int, scheme: str) -> None:
    with browser() as opened:
        page, faults = look(opened, made / "report.html", width, scheme)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        said = page.inner_text("body")
        assert not faults
        assert page.locator("h1").all_inner_texts() == ["Corpus"]
    for shown in ("<a&b>.jsonl", "<i>odd</i>", "short<script>", "site3.example", "no value"):
        assert shown in said
