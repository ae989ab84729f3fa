"""With state, a run reads only new and changed objects, and writes the same corpus."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.ingest import reading, sources, state
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.sources import ResumableFile, Source
from tests.faulty_proxy import FaultyProxy

WORDS = ["Paris", "Seine", "tower", "bridge", "museum", "river", "garden", "street", "bread"]


def lines(seed: int, count: int = 30) -> str:
    choice = random.Random(seed)
    texts = [f"{n} " + " ".join(choice.choices(WORDS, k=60)) for n in range(count)]
    texts += [texts[0], texts[1] + " end", "short"]
    return "".join(json.dumps({"text": text, "id": text[:9]}) + "\n" for text in texts)


def tree(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


class Data:
    """Text in a folder, and a state beside it; ``opened`` counts the objects that are read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.text, self.state = folder, folder / "text", folder / "state"
        self.text.mkdir()
        self.opened: Counter[str] = Counter()
        self._version = 0
        open_file = ResumableFile.__init__

        def counted(file: ResumableFile, source: Any) -> None:
            self.opened[source.uri.rpartition("/")[2]] += 1
            open_file(file, source)

        def fetched(source: Source) -> bytes | None:
            self.opened[source.uri.rpartition("/")[2]] += 1
            return sources.fetched(source)

        monkeypatch.setattr(ResumableFile, "__init__", counted)
        monkeypatch.setattr(reading, "fetched", fetched)

    def put(self, name: str, content: str) -> None:
        (self.text / name).write_text(content)

    def read(self, known: bool = True, **values: Any) -> list[str]:
        """Ingest; returns the names of the objects that were read."""
        self.opened.clear()
        state_uri = str(self.state) if known else ""
        settings = IngestSettings(data_uri=str(self.text), state_uri=state_uri, **values)
        corpus = self.folder / ("corpus" if known else "whole")
        self.result = ingest(settings, corpus=corpus, report=corpus.with_suffix(".html"))
        return sorted(self.opened)

    def check(self, **values: Any) -> None:
        """The corpus and its report equal those of a run that reads everything."""
        assert len(self.read(known=False, **values)) == len(list(self.text.iterdir()))
        assert tree(self.folder / "corpus") == tree(self.folder / "whole")
        reports = [self.folder / f"{name}.html" for name in ("corpus", "whole")]
        assert reports[0].read_bytes() == reports[1].read_bytes()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    data = Data(tmp_path, monkeypatch)
    for number in range(3):
        data.put(f"{number}.jsonl", lines(number))
    return data


def test_only_new_and_changed_objects_are_read(data: Data) -> None:
    assert data.read() == ["0.jsonl", "1.jsonl", "2.jsonl"]
    data.check()
    before = tree(data.state)
    assert data.read() == []
    assert data.result["objects_read"] == 0
    assert tree(data.state) == before
    data.check()

    data.put("11.jsonl", lines(11))  # between the others, so that their numbers change
    assert data.read() == ["11.jsonl"]
    data.check()

    # If a kept document changes or goes, its dropped duplicates come back.
    data.put("0.jsonl", lines(2, 20))
    assert data.read() == ["0.jsonl"]
    data.check()
    (data.text / "2.jsonl").unlink()
    assert data.read() == []
    data.check()
    assert data.read() == []


def test_changed_cleaning_settings_reread_everything(data: Data) -> None:
    data.read()
    assert len(data.read(min_characters=30)) == 3
    data.check(min_characters=30)
    assert data.read(min_characters=30, validation_share=0.3) == []  # decided after reading
    data.check(min_characters=30, validation_share=0.3)


@pytest.mark.long
def test_many_runs_leave_few_files(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "FILES", 3)
    for number in range(100, 105):
        data.put(f"{number}.jsonl", lines(number, 5))
        data.read()
        assert len(list(data.state.glob("documents-*"))) <= 3
    data.check()
    for name in ("0", "1", "2", "101", "102"):
        (data.text / f"{name}.jsonl").unlink()
    data.put("new.jsonl", lines(7))
    assert data.read() == ["new.jsonl"]
    assert len(list(data.state.glob("documents-*"))) == 1  # most of the old documents are unused
    data.check()


def test_a_damaged_or_missing_state_file_is_rebuilt(data: Data) -> None:
    data.read()
    data.put("3.jsonl", lines(3))
    data.read()
    old, new = sorted(data.state.glob("documents-*"), key=lambda path: path.stat().st_mtime_ns)
    old.write_bytes(old.read_bytes()[:-100])
    assert data.read() == ["0.jsonl", "1.jsonl", "2.jsonl"]
    data.check()
    new.unlink()
    assert data.read() == ["3.jsonl"]
    data.check()
    (data.state / "documents-left-behind.parquet").write_bytes(b"by a run that was killed")
    data.put("4.jsonl", lines(4))
    data.read()
    assert not (data.state / "documents-left-behind.parquet").exists()


def test_a_foreign_manifest_is_not_overwritten(data: Data) -> None:
    data.state.mkdir()
    (data.state / "manifest.json").write_text('{"format": "nudge.corpus", "version": 1}')
    with pytest.raises(UserError, match="is nudge.corpus version 1, expected nudge.ingest-state"):
        data.read()
    assert [path.name for path in data.state.iterdir()] == ["manifest.json"]


def test_in_a_store_an_unchanged_object_costs_no_request(
    store: Callable[..., FaultyProxy], tmp_path: Path
) -> None:
    proxy = store(share=0.0)
    client = s3_client()
    for number in range(4):
        client.put_object(Bucket="nudge", Key=f"text/{number}.jsonl", Body=lines(number))

    def asked(**values: Any) -> list[str]:
        """Which objects were asked for, once for each request."""
        proxy.requests.clear()
        settings = IngestSettings(data_uri="s3://nudge/text", **values)
        ingest(settings, corpus=tmp_path / "corpus", report=tmp_path / "report.html")
        paths = [path.partition("?")[0] for _, path, _, _ in proxy.requests]
        return sorted(path for path in paths if path.startswith("/nudge/text/"))

    state_uri = "s3://nudge/state"
    first = asked(state_uri=state_uri)
    assert set(first) == {f"/nudge/text/{n}.jsonl" for n in range(4)}
    assert asked(state_uri=state_uri) == []
    client.put_object(Bucket="nudge", Key="text/1.jsonl", Body=lines(9))
    assert set(asked(state_uri=state_uri)) == {"/nudge/text/1.jsonl"}
    corpus = tree(tmp_path / "corpus")
    assert len(asked()) == len(first)
    assert tree(tmp_path / "corpus") == corpus
