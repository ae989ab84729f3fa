"""One long text is enough for a corpus; packages can add filters."""

import random
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.corpus import read_corpus, read_documents
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.common.readers import Unreadable
from nudge.components.ingest import filters
from nudge.components.ingest import settings as settings_module
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.pieces import piece_size, pieces
from nudge.components.ingest.settings import IngestSettings
from nudge.pipelines.recipes import load


def novel(seed: int = 1, paragraphs: int = 1500) -> str:
    choice = random.Random(seed)
    made = (" ".join(f"w{choice.randrange(3000)}" for _ in range(70)) for _ in range(paragraphs))
    return "\n\n".join(made)


def run(folder: Path, uri: str, **values: Any) -> dict[str, Any]:
    settings = IngestSettings(data_uri=uri, **values)
    return ingest(settings, corpus=folder / "corpus", report=folder / "report.html")


def test_a_single_book_is_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(novel())
    result = run(tmp_path, str(path))
    assert result["train_documents"] > 100
    assert result["validation_documents"] >= MIN_DOCUMENTS
    kept = {
        split: list(read_documents(tmp_path / "corpus", split)) for split in ("train", "validation")
    }
    everything = [d for documents in kept.values() for d in documents]
    assert all(len(d.text) <= 4000 for d in everything)
    # Every paragraph is in one piece and one split, and none is lost.
    found = [p for d in everything for p in d.text.split("\n\n")]
    assert sorted(found) == sorted(novel().split("\n\n"))
    assert {d.id.partition(":")[0] for d in everything} == {"book.txt"}


@pytest.mark.parametrize(
    ("characters", "size"), [(10**7, 4000), (630_000, 2000), (200_000, 1000), (9000, 500)]
)
def test_a_short_book_is_cut_into_shorter_pieces(characters: int, size: int) -> None:
    assert piece_size(characters, 0.1) == size


def test_an_edit_moves_few_pieces() -> None:
    book = novel()
    edited = "A new beginning, which shifts everything after it.\n\n" + book
    before, after = pieces(book, 4000), pieces(edited, 4000)
    assert len(set(before) & set(after)) > 0.95 * len(before)


@pytest.mark.parametrize("text", ["x" * 10_000, "word " * 4000, "line\n" * 4000, "a\n\n" * 4000])
def test_pieces_are_never_too_long_and_no_word_is_lost(text: str) -> None:
    found = pieces(text, 1000)
    assert max(map(len, found)) <= 1000
    assert "".join("".join(found).split()) == "".join(text.split())


def test_a_configured_length_applies_to_every_document(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(novel(number, 20))
    assert run(tmp_path, f"{tmp_path}/*.txt")["documents"] == 40
    result = run(tmp_path, f"{tmp_path}/*.txt", split_characters=2000)
    assert result["documents"] > 160
    assert read_corpus(tmp_path / "corpus").documents_in == result["read"]


def test_a_package_adds_a_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[EntryPoint]:
        return [EntryPoint("no-z", "x:y", group)] if group == "nudge.filters" else []

    def made(settings: IngestSettings) -> filters.Filter:
        return lambda text: Unreadable("has_z") if "z" in text else text

    with pytest.raises(ValueError, match="there is no filter 'no-z'; known: language, length"):
        IngestSettings(data_uri="x", filters=("no-z",))
    for module in (filters, settings_module):
        monkeypatch.setattr(module, "entry_points", points)
    monkeypatch.setattr(EntryPoint, "load", lambda self: made)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(
            f"The text of document {number}." + "z" * (number == 7)
        )
    result = run(tmp_path, f"{tmp_path}/*.txt", filters=("length", "no-z"), workers=1)
    assert result["dropped"] == {"has_z": 1}


def test_relative_paths_of_a_recipe_are_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (beside / "my texts", elsewhere / "old"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    recipe = beside / "a.yaml"
    for data, expected in (
        ("my texts", str(beside / "my texts")),
        ("[my texts, 's3://b/x', /abs]", [str(beside / "my texts"), "s3://b/x", "/abs"]),
        ("old", "old"),  # as older versions read it
        ("nowhere", str(beside / "nowhere")),
        ("one* two", [str(beside / "one*"), str(beside / "two")]),
        ("package://x/y", "package://x/y"),
    ):
        recipe.write_text(f"base_model: hf://a/b\nmodel_name: m\ningest: {{data_uri: {data}}}\n")
        assert load(str(recipe)).values["ingest"]["data_uri"] == expected
    assert load("eiffel").values["ingest"]["data_uri"].startswith("package://")


def test_too_few_short_documents_name_the_setting(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The only document that there is.")
    with pytest.raises(UserError, match=r"too small to split.*ingest\.split_characters"):
        run(tmp_path, str(tmp_path / "a.txt"))
