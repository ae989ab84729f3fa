"""Small objects are fetched concurrently and processed in order; a cluster reads the same."""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from nudge.components.common.artifacts.corpus import read_corpus
from nudge.components.common.artifacts.schema import plain
from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.ingest import reading, sources
from nudge.components.ingest.duplicates import Documents
from nudge.components.ingest.finding import find_sources
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.on_ray import Arriving, groups
from nudge.components.ingest.overlap import overlap_of
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.sources import Source
from tests.components.ingest.test_state import lines, tree
from tests.faulty_proxy import Fault, FaultyProxy

Store = Callable[..., FaultyProxy]


class Watched(LocalFileSystem):  # type: ignore[misc]
    """Serves no file before ``together`` of them are requested, and counts buffered bytes."""

    cachable = False

    def __init__(self, together: int) -> None:
        super().__init__()
        self._meeting = threading.Barrier(together)
        self._lock = threading.Lock()
        self.held = self.most_held = 0

    def cat_file(self, path: str, **_: Any) -> bytes:
        self._meeting.wait(60)
        data = Path(path).read_bytes()
        with self._lock:
            self.held += len(data)
            self.most_held = max(self.most_held, self.held)
        return data


def test_small_objects_are_fetched_concurrently_in_order_and_few_are_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, together = 1000, 4
    monkeypatch.setattr(sources, "BLOCK_BYTES", size)
    monkeypatch.setattr(reading, "AHEAD_BYTES", together * size)
    for number in range(40):
        is_large = number % 10 == 9  # too large to be fetched ahead
        (tmp_path / f"{number:02d}.txt").write_bytes(b"%d" % (number % 9) * (size + is_large))
    watched = Watched(together)
    found = find_sources(str(tmp_path))
    chosen = {
        number: Source(one.uri, watched, one.path, one.listed, one.bytes)
        for number, one in enumerate(found)
    }
    order = []
    with reading.ahead(chosen) as fetched:
        for number, source, data in fetched:
            assert source is chosen[number]
            if number % 10 == 9:
                assert data is None
            else:
                assert data == Path(source.path).read_bytes()
                watched.held -= len(data)
            order.append(number)
    assert order == list(range(40))
    assert watched.most_held <= together * size


def put(prefix: str, count: int) -> Any:
    """Small objects of several kinds, some of them damaged, and one of many blocks."""
    client = s3_client()
    choice = random.Random(5)
    contents = {"large.jsonl": lines(99, 1500).encode()}
    for number in range(count):
        contents[f"{number:03d}.jsonl"] = lines(number, 3).encode()
        contents[f"{number:03d}.txt"] = f"{number} stands in a file of its own".encode()
    contents["cut.jsonl.gz"] = bytes(choice.randrange(256) for _ in range(90))
    for name, raw in contents.items():
        client.put_object(Bucket="nudge", Key=f"{prefix}/{name}", Body=raw)
    return client


def read(folder: Path, uri: str, name: str, **values: Any) -> dict[str, Any]:
    settings = IngestSettings(data_uri=uri, **values)
    ingest(settings, corpus=folder / name, report=folder / f"{name}.html")
    return plain(read_corpus(folder / name))


def test_fetching_ahead_through_faults_gives_the_same_corpus(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: tuple[Fault, ...] = ("500", "503", "reset", "cut-download")
    proxy = store(share=0.0, seed=3, retry_after_s=0, faults=faults)
    put("small", 5)
    with monkeypatch.context() as patched:
        patched.setattr(reading, "fetched", lambda source: None)
        one_by_one = read(tmp_path, "s3://nudge/small", "one-by-one")
    assert one_by_one["dropped"]["damaged"] == 1
    proxy.share = 0.2
    proxy.planned.extend(faults)  # each at least once, the rest by chance
    read(tmp_path, "s3://nudge/small", "ahead")
    assert all(proxy.counts[fault] for fault in faults)
    assert tree(tmp_path / "ahead") == tree(tmp_path / "one-by-one")
    pages = [(tmp_path / name).read_bytes() for name in ("ahead.html", "one-by-one.html")]
    assert pages[0] == pages[1]


def test_tasks_group_neighbors_up_to_a_size_and_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nudge.components.ingest.on_ray.GROUP_BYTES", 100)
    monkeypatch.setattr("nudge.components.ingest.on_ray.GROUP_OBJECTS", 3)
    sizes = [10, 20, 80, 300, 5, None, None, None, 1]
    chosen = {n + 7: Source(str(n), None, "", "", size) for n, size in enumerate(sizes)}
    made = [[number - 7 for number in group] for group in groups(chosen)]
    assert made == [[0, 1], [2], [3], [4, 5, 6], [7, 8]]


def saved(folder: Path, name: str, numbers: list[int]) -> tuple[bytes, dict[int, Any]]:
    """What a node returns for some objects with one document each."""
    place = folder / name
    place.mkdir()
    documents = Documents(place)
    chosen = {}
    for number in numbers:
        path = place / f"{number}.txt"
        path.write_text(f"The only document of object {number}.")
        (chosen[number],) = find_sources(str(path))
    facts = reading.read_objects(chosen, IngestSettings(data_uri="x"), documents, overlap_of([]))
    documents.save(place / "saved", numbers)
    documents.close()
    return (place / "saved").read_bytes(), facts


def pieces(name: str, raw: bytes, facts: dict[int, Any]) -> list[dict[str, Any]]:
    as_json = json.dumps(facts)
    return [
        {"name": name, "size": len(raw), "facts": as_json, "offset": at, "data": raw[at : at + 999]}
        for at in range(0, len(raw), 999)
    ]


def test_a_file_counts_when_it_is_complete_and_only_once(tmp_path: Path) -> None:
    one, other = (saved(tmp_path, name, [3, 4]) for name in ("one", "other"))
    other[1][4]["lost"] = True
    (tmp_path / "here").mkdir()
    documents = Documents(tmp_path / "here")
    arriving = Arriving(tmp_path, documents)
    first, again = pieces("a", *one), pieces("b", *other)
    # The node of `a` is lost before its last piece, and its task reruns on another node, which
    # does not see one object; then the last piece of `a` arrives after all.
    counts = [arriving.take(piece) for piece in [*first[:0:-1], *again, first[0]]]
    assert [count for count in counts if count] == [1, 1]
    assert sorted(arriving.facts) == [3, 4]
    documents.flush()
    assert sorted(documents.query("SELECT object FROM docs")) == [(3,), (4,)]
    documents.close()


def test_missing_ray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    (tmp_path / "a.txt").write_text("A text that is long enough to be kept.")
    with pytest.raises(UserError, match=r"ingest.engine: ray needs Ray.*nudge-lm\[ray\]"):
        read(tmp_path, str(tmp_path / "a.txt"), "corpus", engine="ray")


@pytest.mark.long
def test_ray_reads_the_same_corpus(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Many tasks, each of which returns several pieces.
    monkeypatch.setattr("nudge.components.ingest.on_ray.GROUP_BYTES", 8000)
    monkeypatch.setattr("nudge.components.ingest.on_ray.PIECE_BYTES", 5000)
    proxy = store(share=0.0, seed=5, retry_after_s=0, faults=("500", "503", "reset"))
    put("ray", 8)
    here = read(tmp_path, "s3://nudge/ray", "here")
    asked: set[str] = set()

    def noted(source: Source) -> Any:
        asked.add(source.uri)
        return sources.fetched(source)

    monkeypatch.setattr(reading, "fetched", noted)
    proxy.share = 0.1
    place = str(tmp_path / "state")
    for name in ("ray", "known"):
        there = read(tmp_path, "s3://nudge/ray", name, engine="ray", workers=2, state_uri=place)
        assert there["documents"] == here["documents"]
        assert tree(tmp_path / name) == tree(tmp_path / "here")
        pages = [(tmp_path / f"{one}.html").read_bytes() for one in (name, "here")]
        assert pages[0] == pages[1]
    assert not asked  # by this process
    assert proxy.hurt
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="check AWS_SECRET_ACCESS_KEY"):
        read(tmp_path, "s3://nudge/ray", "refused", engine="ray", workers=2)
