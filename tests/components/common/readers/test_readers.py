"""Every kind of file that users bring, and the damage that such files have."""

import bz2
import codecs
import functools
import gzip
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import EntryPoint
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.readers import (
    Page,
    ReadOptions,
    Record,
    Unreadable,
    guarded,
    large_json,
    read_stream,
    registry,
)
from nudge.components.common.readers import records as records_module
from nudge.components.common.readers.guarded import Worker
from nudge.components.common.readers.names import suffix_of
from tests.components.common.readers import reader_files as made


def records(raw: bytes, name: str, **options: Any) -> list[Record]:
    stream = io.BufferedReader(io.BytesIO(raw))  # type: ignore[type-var]
    found = read_stream(stream, name, ReadOptions(**options))
    return [r._replace(text=r.text.text()) if isinstance(r.text, Page) else r for r in found]


def texts(raw: bytes, name: str, **options: Any) -> list[Any]:
    return [record.text for record in records(raw, name, **options)]


def counted(raw: bytes, name: str, **options: Any) -> Counter[str]:
    found = texts(raw, name, **options)
    return Counter(t.reason if isinstance(t, Unreadable) else "read" for t in found)


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


FRENCH = "Où était l'été, à côté du château, près de la forêt ? Là-bas, dit-il, « très loin ». " * 4
RUSSIAN = "Башня стоит в Париже и видна из каждого окна города, даже ночью. " * 4


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (FRENCH, "cp1252", "windows-1252"),
        (RUSSIAN, "cp1251", "windows-1251"),
        (FRENCH, "utf-16", "utf-16"),
        (FRENCH, "utf-8-sig", ""),
    ],
)
def test_encodings_are_detected_and_reported(text: str, encoding: str, named: str) -> None:
    (record,) = records(text.encode(encoding), "a.txt")
    assert (record.text, record.encoding) == (text, named)
    table = f"id,text\n1,{text.replace(',', ';')}\n".encode(encoding)
    (record,) = records(table, "a.csv")
    assert (record.text, record.encoding) == (text.replace(",", ";"), named)


def test_an_encoding_can_be_set_and_bytes_that_are_not_text_are_counted() -> None:
    (record,) = records("éàü".encode("cp850"), "a.txt", encoding="cp850")
    assert (record.text, record.encoding) == ("éàü", "cp850")
    assert counted("é".encode("cp1252"), "a.txt", encoding="utf-8") == {"wrong_encoding": 1}
    assert counted(bytes(range(256)) * 4, "a.txt") == {"not_utf8": 1}
    cut = codecs.BOM_UTF16_LE + "id,text\n1,one\n2,two\n".encode("utf-16-le")[:-3]
    assert counted(cut, "a.csv") == {"read": 1, "not_utf8": 1}


def test_html_is_read_in_its_declared_encoding() -> None:
    page = '<html><head><meta charset="{}"></head><body><article><p>{}</p></article></body></html>'
    for declared, encoding in (("windows-1252", "cp1252"), ("iso-8859-1", "cp1252")):
        (record,) = records(page.format(declared, FRENCH).encode(encoding), "a.html")
        assert (record.text, record.encoding) == (FRENCH.strip(), "windows-1252")
    # An encoding that is never guessed.
    (record,) = records(page.format("iso-8859-5", RUSSIAN).encode("iso-8859-5"), "a.html")
    assert (record.text, record.encoding) == (RUSSIAN.strip(), "iso8859-5")


def test_lists_in_table_cells_are_text() -> None:
    cells = "".join(
        f"<tr><td>Name {n} of it</td><td><ul><li>First of {n}</li><li>Second of {n}</li></ul></td>"
        "</tr>"
        for n in range(5)
    )
    page = f"<html><body><article><p>{'A sentence about it. ' * 20}</p><table>{cells}</table>"
    (text,) = texts(page.encode(), "a.html")
    for n in range(5):
        assert f"Name {n} of it | First of {n} Second of {n}" in text


def test_a_pdf_without_a_text_layer_is_reported_as_such() -> None:
    raw = made.PDF.replace(b"(The tower is in Paris) Tj", b"( ) Tj" + b" " * 20)
    ((found),) = texts(raw, "a.pdf")
    assert found.reason == "no_text_layer"
    assert "pip install 'nudge-lm[ocr]'" in found.detail


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
    plain = pyarrow.table({"text": pyarrow.array(["x" * 2_500_000] * 120)})
    out = io.BytesIO()
    pyarrow.parquet.write_table(plain, out, compression="zstd", use_dictionary=False)
    for data in (raw, out.getvalue()):
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


def test_office_files_give_their_text() -> None:
    parts = "The tower", "It stands in Paris.", "height | 330 m", "It was built in 1889."
    assert texts(made.word(), "a.docx") == ["\n\n".join(parts)]
    slides = "The tower", "It stands in Paris.", "Mention the year 1889."
    assert texts(made.slides(), "a.pptx") == ["\n\n".join(slides)]
    assert texts(made.open_document(), "a.odt") == ["The tower\n\nIt stands  in Paris."]
    bomb = made.zipped({"word/document.xml": bytes(300 << 20)})
    for suffix in (".docx", ".pptx", ".odt", ".xlsx", ".epub"):
        assert counted(b"no zip", f"a{suffix}") == {"damaged": 1}
        assert counted(made.zipped({"a.txt": b"x"}), f"a{suffix}") == {"damaged": 1}
        assert counted(b"\xd0\xcf\x11\xe0" * 9, f"a{suffix}") == {"encrypted": 1}
        assert counted(bomb, f"a{suffix}") == {"decompression_bomb": 1}


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


def test_books_mail_and_notebooks_give_their_text() -> None:
    assert texts(made.book(), "a.epub") == ["One\n\nThe first chapter.\n\nThe second chapter."]
    body = "The tower\n\nIt stands in Paris, où tout est près."
    assert texts(made.message().as_bytes(), "a.eml") == [body]
    assert texts(made.message(html=True).as_bytes(), "a.eml") == [body]
    assert texts(made.archive_of_mail(), "a.mbox") == [
        "One\n\nIt stands in Paris, où tout est près.",
        "Two\n\nBefore.\n\nFrom here on it is quoted.",
    ]
    assert texts(made.notebook(), "a.ipynb") == ["# The tower\nIt stands in Paris.\n\nheight = 330"]
    assert counted(b"[]", "a.ipynb") == {"bad_record": 1}


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


def _forms(objects: list[dict[str, Any]]) -> list[bytes]:
    dump = functools.partial(json.dumps, ensure_ascii=False)
    return [
        dump(objects).encode(),
        dump(objects).encode("utf-16"),
        dump(objects).encode("utf-8-sig"),
        dump({"title": "x", "people": ["a"], "messages": objects}).encode(),
        dump([each["text"] for each in objects]).encode(),
    ]


@pytest.mark.parametrize("is_file", [True, False])
def test_a_saved_hugging_face_data_set_is_read(is_file: bool) -> None:
    found = records(made.arrow(is_file), "data-00000-of-00001.arrow")
    assert [(record.name, record.text) for record in found] == [("a", "one"), ("b", "two")]
    assert counted(b'{"features": {}}', "dataset_info.json") == {"metadata": 1}
    assert counted(made.arrow(is_file)[:40], "a.arrow")["damaged"] == 1


def test_front_matter_is_removed_unless_it_is_kept() -> None:
    raw = b"---\ntitle: Tower\ntags: [a]\n---\n\n# Tower\n"
    assert texts(raw, "a.md") == ["# Tower\n"]
    assert texts(raw, "a.md", keep_front_matter=True) == [raw.decode()]
    for other in (b"---\nA line that is no mapping\n---\nMore\n", b"---\n\nOnly a rule\n"):
        assert texts(other, "a.md") == [other.decode()]


def test_source_code_is_text_and_only_a_module_of_texts_is_a_mapping() -> None:
    settings = b'"""Settings."""\nimport os\n\nDATABASES = {"default": {"NAME": "x"}}\n'
    assert texts(settings, "settings.py") == [settings.decode()]
    short = b'COLORS = {"a": "red", "b": "blue"}\n'
    assert texts(short, "colors.py") == [short.decode()]
    mapping = (
        b'# made by a tool\ntopics = {"x": "A text inside a literal mapping.", '
        b'"y": "Another text of that mapping."}\n'
    )
    assert [record.name for record in records(mapping, "topics.py")] == ["x", "y"]
    assert texts(b"fn main() {}\n", "main.rs") == ["fn main() {}\n"]
    assert texts(b"x = {\n" + b"[" * 50_000, "deep.py") == ["x = {\n" + "[" * 50_000]


def test_a_parser_is_stopped_after_its_time_memory_and_its_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker()
    monkeypatch.setattr("nudge.components.common.readers.guarded.SECONDS", 1.0)
    started = time.monotonic()
    hostile = b"__import__('time').sleep(60)", b"bytearray(3 << 30)", b"__import__('os').abort()"
    found = [worker.call(eval, code, (), ()) for code in (*hostile, b"1")]
    assert [getattr(each, "reason", each) for each in found] == [
        "too_slow",
        "too_much_memory",
        "reader_crashed",
        1,
    ]
    assert time.monotonic() - started < 50
    worker.close()


def test_html_that_takes_too_long_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted(b"<html><body><p>warm up</p></body></html>", "a.html")
    monkeypatch.setattr(guarded, "SECONDS", 0.2)
    slow = b"<html><body>" + b"<div><p>a" * 120_000 + b"</body></html>"
    started = time.monotonic()
    (found,) = texts(slow, "a.html")
    assert isinstance(found, Unreadable)
    assert time.monotonic() - started < 30


def test_a_missing_library_is_named() -> None:
    with pytest.raises(UserError, match=r"package nowhere_at_all.*nudge-lm\[data\]"):
        guarded.guarded(len, b"x", needs=("nowhere_at_all",))


def test_a_package_adds_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[EntryPoint]:
        assert group == "nudge.readers"
        return [EntryPoint(".LOG", f"{__name__}:shout", group)]

    monkeypatch.setattr(registry, "entry_points", points)
    monkeypatch.setattr(EntryPoint, "load", lambda self: shout)
    registry.readers.cache_clear()
    try:
        assert texts(gzip.compress(b"a line"), "x.log.gz") == ["A LINE"]
    finally:
        monkeypatch.undo()
        registry.readers.cache_clear()
    assert registry.reason_unread("x.log.gz") == "unknown_kind"


def shout(stream: Any, name: str, options: ReadOptions) -> Any:
    yield Record(name, stream.read().decode().upper())


def test_a_wiki_dump_gives_its_articles_as_plain_text() -> None:
    """Bold, links, templates, references and tables are markup; redirects and talk no articles."""
    article = (
        "'''The tower''' stands in [[Paris|the capital]].&lt;ref&gt;A book&lt;/ref&gt; {{stub}}\n\n"
        '== Height ==\nIt is 330 m high.\n{| class="wikitable"\n| a || b\n|}\n'
    )
    pages = [("Tower", "0", article, ""), ("Talk:Tower", "1", "I agree.", ""),
             ("Eiffel", "0", "#REDIRECT [[Tower]]", "<redirect title='Tower'/>"),
             ("Empty", "0", "{{stub}}", "")]  # fmt: skip
    xml = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns>{more}<revision><text>{text}</text></revision>"
        "</page>"
        for title, ns, text, more in pages
    )
    name_space = "http://www.mediawiki.org/xml/export-0.11/"
    dump = f"<mediawiki xmlns='{name_space}'><siteinfo/>{xml}</mediawiki>".encode()
    found = {each.name: each.text for each in records(bz2.compress(dump), "wiki.xml.bz2")}
    assert found["Tower"] == "The tower stands in the capital.\n\nHeight\nIt is 330 m high."
    assert found["Talk:Tower"] == found["Eiffel"] == Unreadable("metadata")
    assert isinstance(found["Empty"], Unreadable)
    cut = records(dump[:-200], "wiki.xml")
    assert isinstance(cut[-1].text, Unreadable)
    (other,) = records(b"<a>The tower</a>", "a.xml")
    assert other.text == Unreadable("unknown_kind", "XML, but no MediaWiki dump")
    bomb = b"<!DOCTYPE m [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;'>]>" + dump.replace(
        b"{{stub}}", b"&b;"
    )
    assert all("aaaa" not in str(each.text) for each in records(bomb, "bomb.xml"))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("Makefile", ".txt"),
        ("LICENSE", ".txt"),
        ("README.gz", ".txt"),
        ("program", ""),
        ("1700.M1P1.host,S=100:2,S", ".eml"),
        ("1700.M1P1.host,S=100:2,", ".eml"),
    ],
)
def test_names_without_a_suffix_are_known_by_custom(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix
