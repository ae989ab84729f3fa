"""Near duplicates and their clusters against plain reference computations; a stable split."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from nudge.components.common.artifacts.corpus import read_documents
from nudge.components.ingest import duplicates, ordering
from nudge.components.ingest.cleaning import Row
from nudge.components.ingest.duplicates import BUCKETS, NGRAM, ROWS, Documents, word_hashes
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from tests.components.ingest.splits import split_of


def signature(text: str) -> list[int]:
    return duplicates.signature(word_hashes(text))


def words(count: int, choice: random.Random) -> list[str]:
    return [f"w{choice.randrange(10**6)}" for _ in range(count)]


def changed(text: list[str], count: int, choice: random.Random) -> list[str]:
    positions = set(choice.sample(range(len(text)), count))
    return [f"x{choice.randrange(10**6)}" if n in positions else w for n, w in enumerate(text)]


def jaccard(one: list[str], other: list[str]) -> float:
    grams = [{tuple(t[n : n + NGRAM]) for n in range(len(t) - NGRAM + 1)} for t in (one, other)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


@pytest.mark.parametrize("edits", [10, 15, 20, 30])
def test_pairs_are_found_as_often_as_minhash_predicts(edits: int) -> None:
    choice = random.Random(edits)
    found, promised = 0, []
    for _ in range(150):
        text = words(400, choice)
        other = changed(text, edits, choice)
        promised.append(1 - (1 - jaccard(text, other) ** ROWS) ** BUCKETS)
        keys = zip(signature(" ".join(text)), signature(" ".join(other)), strict=True)
        found += any(a == b for a, b in keys)
    spread = sum(p * (1 - p) for p in promised) ** 0.5
    assert abs(found - sum(promised)) < 4 * spread + 1


def test_case_accents_and_punctuation_do_not_count() -> None:
    text = "Le café, près de l’église: “ouvert” dès huit heures, tous les jours sauf lundi."
    assert signature(text) == signature(text.upper().replace(",", " ,").replace("É", "E"))
    assert signature("one two") != signature("two one")
    assert signature("-- --") != signature("** **")  # neither has a word left


def test_the_hash_of_a_word_does_not_depend_on_the_words_before() -> None:
    words = ["\u0301.ab", ".ab", "\u0301", "(Ab)", "\u212a", "k", "\u0130", "é", "e", "--", "ab"]

    def hashes(order: list[str]) -> dict[str, int]:
        duplicates._words.clear()
        return {word: duplicates._words[word] for word in order}

    found = hashes(words)
    assert found == hashes(words[::-1]) == {word: hashes([word])[word] for word in words}
    assert found["(Ab)"] == found[".ab"] == found["ab"] != found["\u0301.ab"]
    assert (found["--"], found["\u0301"]) == (0, 0)
    assert (found["k"], found["e"]) == (found["\u212a"], found["é"])


def test_scripts_without_spaces_have_near_duplicates_too() -> None:
    choice = random.Random(2)
    text = "".join(chr(choice.randrange(0x4E00, 0x9FFF)) for _ in range(400))
    other = text[:200] + "\u4e00" + text[200:]
    assert set(signature(text)) & set(signature(other))


def test_a_long_text_is_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(words(1000, random.Random(1)))
    whole = signature(text)
    monkeypatch.setattr(duplicates, "CHUNK", 7)
    monkeypatch.setattr(duplicates, "LONG", 100)
    monkeypatch.setattr(duplicates, "WORDS_HELD", 100)
    duplicates._words.clear()
    assert signature(text) == whole


def union_find(rows: list[tuple[str, list[int]]]) -> list[int]:
    """Each row's cluster, named by its smallest member; rows with a common key belong together."""
    parent = list(range(len(rows)))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    seen: dict[tuple[int, int] | str, int] = {}
    for number, (sha256, keys) in enumerate(rows):
        marks: list[tuple[int, int] | str] = [sha256, *enumerate(keys)]
        for mark in marks:
            one, other = root(seen.setdefault(mark, number)), root(number)
            parent[max(one, other)] = min(one, other)
    return [root(number) for number in range(len(rows))]


@pytest.mark.parametrize("seed", range(4))
def test_clusters_equal_those_of_union_find(tmp_path: Path, seed: int) -> None:
    # Few values in some buckets make long chains and large clusters.
    choice = random.Random(seed)
    rows: list[tuple[str, list[int]]] = []
    for number in range(400):
        if rows and choice.random() < 0.1:
            rows.append(choice.choice(rows))
            continue
        keys = [choice.randrange(10**9) for _ in range(BUCKETS)]
        for _ in range(choice.choice([0, 1, 1, 2])):
            keys[choice.randrange(BUCKETS)] = choice.randrange(25)
        rows.append((f"{number:05d}", keys))
    shares = {sha256: choice.random() for sha256, _ in rows}
    documents = Documents(tmp_path)
    for index, (sha256, keys) in enumerate(rows):
        row = Row("id", "text", "", "", sha256, shares[sha256], 4, 4, tuple(keys))
        documents.add(0, index, row)
    documents.find_duplicates(near=True)
    verdicts = dict(documents.query("SELECT doc, reason FROM verdicts"))
    documents.close()

    clusters: dict[int, list[int]] = {}
    for number, cluster in enumerate(union_find(rows)):
        clusters.setdefault(cluster, []).append(number)
    assert len(verdicts) == len(rows)
    assert max(map(len, clusters.values())) > 10
    for members in clusters.values():
        first = {rows[n][0]: n for n in reversed(members)}
        best = max(members, key=lambda n: (shares[rows[n][0]], rows[n][0]))
        kept = first[rows[best][0]]
        for number in members:
            expected = None if number == kept else "near_duplicate"
            if first[rows[number][0]] != number:
                expected = "duplicate"
            assert verdicts[number] == expected


def test_a_document_never_moves_between_splits(tmp_path: Path) -> None:
    """A corpus grows by new texts, copies and variants that join clusters. A text that was
    trained on is never held out later, and neither is a variant of it."""
    choice = random.Random(7)
    settings = IngestSettings(data_uri=str(tmp_path / "*.txt"), validation_share=0.3)
    texts: list[list[str]] = []
    first: dict[str, str] = {}
    moved = 0
    for night in range(3):
        for number in range(50):
            if texts and choice.random() < 0.5:
                made = changed(choice.choice(texts), choice.choice([0, 1, 3, 9]), choice)
            else:
                made = words(80, choice)
            texts.append(made)
            (tmp_path / f"{night}-{number}.txt").write_text(" ".join(made))
        ingest(settings, corpus=tmp_path / "corpus", report=tmp_path / "report.html")
        splits = {
            split: [d.text for d in read_documents(tmp_path / "corpus", split)]
            for split in ("train", "validation")
        }
        keys = {split: {*map(tuple, map(pairs, kept))} for split, kept in splits.items()}
        shared = {k for row in keys["train"] for k in row} & {
            k for row in keys["validation"] for k in row
        }
        assert not shared
        for split, kept in splits.items():
            for text in kept:
                assert split_of(text, settings) == split
                assert first.setdefault(text, split) == split
        trained = {k for t, s in first.items() if s == "train" for k in pairs(t)}
        moved += len({k for row in keys["validation"] for k in row} & trained)
    assert moved == 0
    assert len(first) > 70


def test_texts_larger_than_the_memory_of_the_tables_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "MEMORY", "32MB")
    texts = [chr(0x4E00 + number) * 1_000_000 for number in range(30)]
    (tmp_path / "again").mkdir()
    documents, again = Documents(tmp_path), Documents(tmp_path / "again")
    for index, text in enumerate(texts):
        keys = tuple(range(index * BUCKETS, (index + 1) * BUCKETS))
        documents.add(3, index, Row("id", text, "", "", str(index), 0.5, 0, 3_000_000, keys))
    documents.find_duplicates(near=True)
    documents.save(tmp_path / "saved.parquet", [3])
    again.load(tmp_path / "saved.parquet", {3: 8})
    for held, number in ((documents, 3), (again, 8)):
        found = held.query("SELECT doc, text_at, bytes FROM docs")
        read = {doc: held.text(*where) for doc, *where in found}
        assert read == {(number << duplicates.PLACES) | n: text for n, text in enumerate(texts)}
        held.close()


def pairs(text: str) -> list[tuple[int, int]]:
    return list(enumerate(signature(text)))


def test_signatures_are_the_same_everywhere() -> None:
    keys = np.array(signature("a b c d e f g"), np.uint64)
    assert int(np.bitwise_xor.reduce(keys)) == 13756489652655180688


@pytest.mark.parametrize("part_bytes", [1, 200, 4000, 1 << 20])
def test_rows_are_sorted_by_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(ordering, "PART_BYTES", part_bytes)
    rows = [(hashlib.sha256(b"%d" % n).hexdigest(), n, "text") for n in range(500)]
    ordered = ordering.in_hash_order(iter(rows), 500 * 68, tmp_path)
    assert list(ordered) == sorted(rows)
    assert list(tmp_path.iterdir()) == []
