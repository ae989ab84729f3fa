"""Any content of a file is read or counted under a reason, without a crash and without loss."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nudge.components.common.artifacts.corpus import zstd
from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.readers import Page, ReadOptions, Unreadable, read_stream, records
from nudge.components.common.readers.registry import READERS
from nudge.components.common.readers.source_code import SUFFIXES
from tests.components.common.readers.reader_files import PDF, samples

OPTIONS = ReadOptions()
CHECKED: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda raw: zstd.compress(raw, options=CHECKED),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(
    raw: bytes, name: str, options: ReadOptions = OPTIONS
) -> list[tuple[str, str | Unreadable | Conversation]]:
    stream = io.BufferedReader(io.BytesIO(raw))  # type: ignore[type-var]
    records = read_stream(stream, name, options)
    return [(r.name, r.text.text() if isinstance(r.text, Page) else r.text) for r in records]


def counted(raw: bytes, name: str) -> Counter[str]:
    return Counter(t.reason if isinstance(t, Unreadable) else "read" for _, t in read(raw, name))


def lines(count: int) -> bytes:
    return b"".join(b'{"text": "number %d", "id": "n%d"}\n' % (n, n) for n in range(count))


def archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, raw in members.items():
            file.writestr(name, raw)
    return out.getvalue()


def test_a_truncated_stream_keeps_what_came_before() -> None:
    whole = gzip.compress(lines(20_000))
    found = counted(whole[: len(whole) // 2], "a.jsonl.gz")
    assert found["damaged"] == 1
    assert 5_000 < found["read"] < 20_000
    assert counted(zstd.compress(lines(9))[:-8], "a.jsonl.zst")["damaged"] == 1
    assert counted(b"no gzip at all", "a.txt.gz") == {"damaged": 1}


@pytest.mark.parametrize("suffix", sorted(PACKERS))
def test_each_compression_is_read_intact_truncated_and_damaged(suffix: str) -> None:
    pack, name = PACKERS[suffix], f"a.jsonl{suffix}"
    assert counted(pack(lines(900)), name) == {"read": 900}
    assert counted(pack(lines(9)) + pack(lines(5)), name) == {"read": 14}
    assert counted(pack(lines(900))[:-20], name)["damaged"] == 1
    raw = bytearray(pack(lines(900)))
    raw[len(raw) // 2] ^= 0xFF
    assert counted(bytes(raw), name)["damaged"] == 1


def test_lines_that_are_not_records_are_counted_one_by_one() -> None:
    raw = lines(2) + b'not json\n{"body": "x"}\n{"text": null}\n[1]\n{"text": "\xff"}\n\n'
    raw += b'{"text": "nul\0here"}\n{"text": "escaped nul\\u0000"}\n'
    raw += b"[" * 100_000 + b"\n" + b'{"text": "last"}'
    reasons = {"read": 4, "bad_record": 4, "no_column": 1, "no_text": 1, "not_utf8": 1}
    assert counted(raw, "a.jsonl") == reasons


def test_an_endless_line_is_counted_and_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECORD_BYTES", 1000)
    long = b'{"text": "' + b"x" * 3_000_000 + b'"}\n'
    assert counted(lines(1) + long + lines(1), "a.jsonl") == {"read": 2, "too_long": 1}
    assert counted(long, "a.txt") == {"too_long": 1}
    rows = b"text\none\n" + b"y" * 5000 + b"\nthree\n"
    assert counted(rows, "a.csv")["read"] == 2


def test_a_line_of_100_mb_is_counted_with_its_bytes_and_not_kept_in_memory() -> None:
    long = b'{"text": "' + b"x" * 100_000_000 + b'"}\n'
    raw = gzip.compress(lines(1) + long + lines(1), 1)
    size = len(long)
    del long
    tracemalloc.start()
    found = read(raw, "a.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [text if isinstance(text, Unreadable) else "read" for _, text in found] == [
        "read",
        Unreadable("too_long", bytes=size),
        "read",
    ]
    assert peak < 2.5 * records.RECORD_BYTES


def test_csv_rows_with_bad_bytes_do_not_affect_their_neighbors() -> None:
    raw = b'id,text\n1,"two\nlines"\n2,\xff\xfe\n3\n4,nul\0here\n'
    assert read(raw, "a.csv") == [
        ("1", "two\nlines"),
        ("2", Unreadable("not_utf8", bytes=2)),
        ("3", Unreadable("no_text")),
        ("4", "nul\0here"),
    ]


def test_tables_with_tabs_with_bare_returns_and_without_a_header(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [("1", "one, and"), ("2", "two")]
    assert read(b"id\ttext\n1\tone, and\n2\ttwo\n", "a.tsv") == expected
    assert read(b'id,text\r1,"one, and"\r2,two\r', "a.csv") == expected
    assert read(b'\r\n\nid,text\r\n1,"one, and"\r\n2,two', "a.csv") == expected
    assert read(b'text\n"one\rand\r\nmore"', "a.csv") == [("1", "one\rand\r\nmore")]
    monkeypatch.setattr(records, "RECORD_BYTES", 1000)
    assert read(b"x" * 2000 + b"\na,b\n", "a.csv") == [
        ("a.csv", Unreadable("too_long", bytes=2001))
    ]
    before = csv.field_size_limit(1000)
    try:
        assert counted(b'id,"text' + b"\n" * 2000 + b'"\n1,a\n', "a.csv") == {"unclosed_quote": 1}
    finally:
        csv.field_size_limit(before)


def test_values_without_a_python_type_do_not_end_a_table() -> None:
    days, nanoseconds = pyarrow.array([0, 10**7], "int32"), pyarrow.array([0, 10**15 + 1])
    odd = {
        "a day of the year 29349": days.view("date32"),
        "a time in nanoseconds": nanoseconds.view(pyarrow.timestamp("ns")),
        "a zone that nobody knows": nanoseconds.view(pyarrow.timestamp("ms", "Nowhere/Never")),
    }
    for what, ids in odd.items():
        out = io.BytesIO()
        table = pyarrow.table({"id": ids, "text": ["first", "second"], "odd": ids})
        pyarrow.parquet.write_table(table, out)
        found = read(out.getvalue(), "a.parquet")
        assert [text for _, text in found] == ["first", "second"], what
        assert found[1][0] == "2", what  # the row number names it
        pyarrow.parquet.write_table(
            table.rename_columns(["odd", "id", "text"]), out := io.BytesIO()
        )
        assert counted(out.getvalue(), "a.parquet").keys() <= {"no_text", "bad_record"}, what


def test_each_row_of_a_corrupt_row_group_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"id": list(range(300)), "text": [f"text {n}" * 9 for n in range(300)]})
    pyarrow.parquet.write_table(table, path, row_group_size=100, compression="zstd")
    raw = bytearray(path.read_bytes())
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    raw[start : start + column.total_compressed_size] = b"\xa5" * column.total_compressed_size
    assert counted(bytes(raw), "a.parquet") == {"read": 200, "damaged": 100}
    assert counted(bytes(raw[:-9]), "a.parquet") == {"damaged": 1}
    assert counted(gzip.compress(path.read_bytes()), "a.parquet.gz") == {"read": 300}


def test_archives_give_their_members_and_write_nothing_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = {"a.txt": b"one", "in/b.jsonl": lines(2), "c.jsonl.gz": gzip.compress(lines(1))}
    found = read(archive(good), "a.zip")
    assert [n for n, _ in found] == ["a.txt", "in/b.jsonl:n0", "in/b.jsonl:n1", "c.jsonl.gz:n0"]
    bad = {"../../x.txt": b"x", "/etc/x.txt": b"x", "x.exe": b"x", "y.zip": archive(good)}
    assert counted(archive(bad), "a.zip") == {"unsafe_path": 2, "unknown_kind": 1, "not_text": 1}
    monkeypatch.setattr(records, "BOMB_BYTES", 1 << 20)
    bomb = {"a.txt": bytes(9 << 20), "b.txt": b"fine"}
    assert counted(archive(bomb), "a.zip") == {"decompression_bomb": 1, "read": 1}
    assert counted(gzip.compress(bytes(99 << 20)), "a.jsonl.gz")["decompression_bomb"] == 1
    assert counted(archive(good)[:-30], "a.zip") == {"damaged": 1}


def test_pdf_and_web_pages() -> None:
    assert read(PDF, "a.pdf") == [("a.pdf", "The tower is in Paris")]
    assert counted(b"%PDF-1.7 broken", "a.pdf") == {"damaged": 1}
    page = b"<html><body><nav>menu</nav><article><p>%s</p></article></body></html>"
    ((_, text),) = read(page % (b"A long sentence about the tower. " * 20), "a.html")
    assert isinstance(text, str)
    assert text.startswith("A long sentence")
    assert "menu" not in text


SEEDS = samples()
ALIASES = {*SUFFIXES, *[".htm", ".xhtml", ".ndjson", ".markdown", ".mdx", ".asciidoc"]}


@pytest.mark.parametrize("suffix", sorted({*READERS} - ALIASES))
@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.binary(max_size=6)), max_size=4),
    packed=st.sampled_from(["", *PACKERS]),
)
def test_no_bytes_crash_a_reader(suffix: str, cuts: list[tuple], packed: str) -> None:  # type: ignore[type-arg]
    raw = SEEDS[suffix]
    for place, removed, added in cuts:
        at = int(place * len(raw))
        raw = raw[:at] + added + raw[at + removed :]
    pack = {"": bytes, **PACKERS}[packed]
    for name, text in read(pack(raw), f"a{suffix}{packed}"):
        assert isinstance(name, str)
        assert isinstance(text, str | Unreadable)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_written_texts_are_read_back(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    assert [text for _, text in read(raw, "a.jsonl")] == texts
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerows([["text"], *([text] for text in texts)])
    assert [text for _, text in read(out.getvalue().encode(), "a.csv")] == texts
