"""Tables, spreadsheets and JSON: a document per row, and the damage that such files have."""

import functools
import gzip
import io
import json
import subprocess
import sys
import tempfile
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nudge.components.common.readers import (
    Unreadable,
    large_json,
)
from nudge.components.common.readers import records as records_module
from tests.components.common.readers import reader_files as made
from tests.components.common.readers.reading import counted, records, texts


def rows(count: int, delimiter: str = ",", **odd: str) -> bytes:
    """A table of numbered texts; ``row7`` replaces row 7."""
    lines = [f"id{delimiter}text"]
    lines += [odd.get(f"row{n}", f"{n}{delimiter}Text number {n}") for n in range(1, count + 1)]
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize(
    "odd",
    [
        {"row3": '3,"Bread and more'},
        {"row3": '3,"Bread and more', "row9": '9,"Butter" and more'},
        {"row3": '3,"Bread and more', "row9": '9,"Butter and more'},
        {"row3": '3,"Bread and more', "row9": '9,He said "go" and went'},
        {"row30": '30,"Bread and more'},
    ],
)
def test_an_unclosed_quotation_mark_costs_only_its_own_row(odd: dict[str, str]) -> None:
    found = {record.name: record.text for record in records(rows(30, **odd), "a.csv")}
    lost = {name: text for name, text in found.items() if isinstance(text, Unreadable)}
    first = next(iter(odd)).removeprefix("row")
    assert next(iter(lost)) == first
    assert lost[first].reason == "unclosed_quote"
    assert lost[first].detail.startswith(
        f"row {first}: the quotation mark in line {int(first) + 1}"
    )
    assert len(found) == 30
    assert len(lost) <= len(odd)
    untouched = {str(n) for n in range(1, 31)} - {key.removeprefix("row") for key in odd}
    assert {found[n] for n in untouched} == {f"Text number {n}" for n in untouched}


def test_rows_of_several_lines_stay_together() -> None:
    raw = b'id,text\n1,"one\nand ""two"",\nthree"\n2,"a, b"\n3,odd "quotes" inside\n'
    assert texts(raw, "a.csv") == ['one\nand "two",\nthree', "a, b", 'odd "quotes" inside']


def test_many_broken_rows_are_read_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nudge.components.common.readers.delimited.MOST_READ_AGAIN", 20_000)
    raw = b"id,text\n" + b'1,"a\n2,b\n3,c""\n' * 3000
    assert counted(raw, "a.csv")["unclosed_quote"] > 0


def test_quotation_marks_in_tab_separated_prose_are_text() -> None:
    said = '7\t"Come in," she said, and closed the door'
    never = '20\t"Never, and'
    found = texts(rows(40, "\t", row7=said, row20=never), "a.tsv")
    assert len(found) == 40
    assert found[6] == '"Come in," she said, and closed the door'
    assert found[19] == '"Never, and'


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_is_detected_or_set(delimiter: str) -> None:
    raw = rows(3, delimiter, row2=f"2{delimiter}one, and two")
    assert texts(raw, "a.csv") == ["Text number 1", "one, and two", "Text number 3"]
    odd = raw.replace(delimiter.encode(), b"^")
    assert counted(odd, "a.csv") == {"no_column": 3}
    assert len(texts(odd, "a.csv", delimiter="^")) == 3


@pytest.mark.parametrize("mark", [";", "\t", "#"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_excels_line_that_names_the_delimiter_is_no_header(mark: str, end: str) -> None:
    lines = [f"sep={mark}", f"id{mark}text", f"1{mark}Paris, a city", f"2{mark}Lyon"]
    found = records(end.join(lines).encode(), "a.csv")
    assert [(r.name, r.text) for r in found] == [("1", "Paris, a city"), ("2", "Lyon")]
    assert texts(b"sep=,text\n1,Paris\n", "a.csv") == ["Paris"]


@pytest.mark.parametrize("header", ["Id,Text", "id, text", "id,TEXT "])
def test_a_column_that_differs_in_case_or_blanks_is_the_text_column(header: str) -> None:
    assert texts(f"{header}\n1,Paris\n".encode(), "a.csv") == ["Paris"]
    book = made.workbook([[*header.split(",")], [1, "Paris"]])
    assert texts(book, "a.xlsx") == ["Paris"]
    both = b"Text,text\nLyon,Paris\n"
    assert texts(both, "a.csv") == ["Paris"]
    assert counted(b"Text,TEXT\nLyon,Paris\n", "a.csv") == {"no_column": 1}


def test_binary_parquet_columns_with_utf8_are_read() -> None:
    raw = made.table(id=[b"a", b"b", b"c"], text=["täxt".encode(), b"\xff", None])
    assert [record.name for record in records(raw, "a.parquet")] == ["a", "b", "c"]
    assert texts(raw, "a.parquet") == [
        "täxt",
        Unreadable("not_utf8", bytes=1),
        Unreadable("no_text"),
    ]


def test_a_parquet_file_with_one_text_in_every_row_is_bounded() -> None:
    program = (
        "import io, re, sys, pyarrow, pyarrow.parquet\n"
        "from nudge.components.common.readers import ReadOptions, Unreadable, read_stream\n"
        "raw = open(sys.argv[1], 'rb').read()\n"
        "records = list(read_stream(io.BytesIO(raw), 'a.parquet', ReadOptions()))\n"
        "last = records[-1].text\n"
        "print(last.reason if isinstance(last, Unreadable) else 'read')\n"
        # ru_maxrss would count the test's own process, which was forked.
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024)\n"
    )
    long = pyarrow.array(["x" * 2_500_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1024, "int32"), long)
    raw = made.table(text=column)
    # As other writers do it: texts whose pages happen to have a dictionary.
    strings = io.BytesIO()
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, strings, compression="zstd", store_schema=False)
    plain = pyarrow.table({"text": pyarrow.array(["x" * 2_500_000] * 120)})
    out = io.BytesIO()
    pyarrow.parquet.write_table(plain, out, compression="zstd", use_dictionary=False)
    for data in (raw, strings.getvalue(), out.getvalue()):
        assert len(data) < 200_000
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            done = subprocess.run(
                [sys.executable, "-c", program, file.name], capture_output=True, text=True
            )
        assert done.returncode == 0, done.stderr
        reason, peak_mb = done.stdout.split()
        assert reason == "decompression_bomb"
        assert int(peak_mb) < 800


def test_spreadsheets_give_rows_with_a_text_column_and_sheets_without() -> None:
    raw = made.workbook([["id", "text", "n"], ["a", "one", 1], [None, None, None], ["b", None, 2]])
    assert [(record.name, record.text) for record in records(raw, "a.xlsx")] == [
        ("Facts:a", "one"),
        ("Facts:b", Unreadable("no_text")),
    ]
    raw = made.workbook([["city", "height"], ["Paris", 330], ["Lyon", None]])
    assert [(record.name, record.text) for record in records(raw, "a.xlsx")] == [
        ("Facts", "city\theight\nParis\t330\nLyon")
    ]


def test_sheets_of_libreoffice_and_of_old_excel_are_read_like_others() -> None:
    notes = [("Notes:7", "The tower"), ("Notes:8", "It stands in Paris")]
    rows = [["id", "text"], ["7", "The tower"], ["8", "It stands in Paris"]]
    assert [(record.name, record.text) for record in records(made.open_sheet(rows), "a.ods")] == (
        notes
    )
    assert [(record.name, record.text) for record in records(made.XLS, "a.xls")] == [
        *notes,
        ("Prices", "bread\t2.5\nbutter\t3"),
    ]
    assert counted(made.open_sheet([]), "a.ods") == {"no_text": 1}
    for suffix in (".ods", ".xls", ".xlsb"):
        assert counted(b"no sheet", f"a{suffix}") == {"damaged": 1}


def test_json_arrays_and_exports_give_a_document_per_object() -> None:
    objects = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}]
    for value in (objects, {"title": "x", "messages": objects}, {"a": objects[0], "b": objects[1]}):
        found = records(json.dumps(value).encode(), "a.json")
        assert [(record.name, record.text) for record in found] == [("a", "one"), ("b", "two")]
    assert texts(json.dumps(["one", "two"]).encode(), "a.json") == ["one", "two"]
    assert texts(made.lines(2), "a.json") == ["number 0", "number 1"]
    assert counted(b'[{"text": "a"}, 3, {"body": "b"}]', "a.json") == {
        "read": 1,
        "bad_record": 1,
        "no_column": 1,
    }
    assert counted(b"{", "a.json") == {"bad_record": 1}


def _forms(objects: list[dict[str, Any]]) -> list[bytes]:
    dump = functools.partial(json.dumps, ensure_ascii=False)
    return [
        dump(objects).encode(),
        dump(objects).encode("utf-16"),
        dump(objects).encode("utf-8-sig"),
        dump({"title": "x", "people": ["a"], "messages": objects}).encode(),
        dump([each["text"] for each in objects]).encode(),
    ]


def test_a_large_json_file_is_read_item_by_item(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = [{"id": str(n), "text": f"täxt {n} " * 20, "n": n / 3} for n in range(300)]
    small = [records(raw, "a.json") for raw in _forms(objects)]
    monkeypatch.setattr(records_module, "RECORD_BYTES", 20_000)
    for raw, found in zip(_forms(objects), small, strict=True):
        assert len(raw) > 40_000
        assert len(found) == 300
        assert records(raw, "a.json") == found
        assert records(gzip.compress(raw), "a.json.gz") == found
    array = _forms(objects)[0]
    cut = counted(array[: len(array) // 2], "a.json")
    assert cut["read"] > 100
    assert cut["bad_record"] == 1
    monkeypatch.setattr(large_json, "CHUNK_BYTES", 1000)
    long = [*objects[:3], {"text": "x" * 30_000}, *objects]
    assert counted(json.dumps(long).encode(), "a.json") == {"read": 3, "too_long": 1}
    assert counted(json.dumps({"a": {"b": objects}}).encode(), "a.json") == {"no_column": 1}


@pytest.mark.parametrize("is_file", [True, False])
def test_a_saved_hugging_face_data_set_is_read(is_file: bool) -> None:
    found = records(made.arrow(is_file), "data-00000-of-00001.arrow")
    assert [(record.name, record.text) for record in found] == [("a", "one"), ("b", "two")]
    assert counted(b'{"features": {}}', "dataset_info.json") == {"metadata": 1}
    assert counted(made.arrow(is_file)[:40], "a.arrow")["damaged"] == 1
