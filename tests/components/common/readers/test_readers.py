"""Files of every kind but tables and chats, and the damage that such files have."""

import bz2
import codecs
import gzip
import json
import time
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.readers import (
    ReadOptions,
    Record,
    Unreadable,
    guarded,
    hidden_part,
    registry,
)
from nudge.components.common.readers.guarded import Worker
from nudge.components.common.readers.names import suffix_of
from tests.components.common.readers import outlook
from tests.components.common.readers import reader_files as made
from tests.components.common.readers.reading import counted, records, texts

FRENCH = "Où était l'été, à côté du château, près de la forêt ? Là-bas, dit-il, « très loin ». " * 4
HUNGARIAN = "A gyönyörű öreg hölgy tűzhelyén sült a kenyér, és mindenki örült. " * 4
POLISH = "Zażółć gęślą jaźń, a potem idź do domu, bo już późno i zimno. " * 4
TURKISH = "İstanbul'da şimdi güneşli bir gün, çocuklar dışarıda oynuyor. " * 4
LITHUANIAN = "Žmonės čia gyvena ilgai, ir šiandien saulė šviečia ąžuolui. " * 4
GERMAN = "Die Straße führt über die Brücke nach Köln, wo schöne Häuser stehen. " * 4
ENGLISH = "The tower stands in the city and many people visit it every day. "
RUSSIAN = "Башня стоит в Париже и видна из каждого окна города, даже ночью. " * 4


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (FRENCH, "cp1252", "windows-1252"),
        (RUSSIAN, "cp1251", "windows-1251"),
        (HUNGARIAN, "cp1250", "windows-1250"),
        (POLISH, "cp1250", "windows-1250"),
        (TURKISH, "cp1254", "windows-1254"),
        (LITHUANIAN, "cp1257", "windows-1257"),
        (GERMAN, "cp1252", "windows-1252"),
        (ENGLISH * 9 + "It was déjà vu. " + ENGLISH * 5, "cp1252", "windows-1252"),
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


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text", [FRENCH, "The tower stands in Paris.", "Башня стоит в Париже. " * 9]
)
def test_utf_16_without_a_mark_is_detected(order: str, text: str) -> None:
    (record,) = records(text.encode(order), "a.txt")
    assert (record.text, record.encoding) == (text, order)
    (row,) = records(f'id,text\n1,"{text}"\n'.encode(order), "a.csv")
    assert (row.text, row.encoding) == (text, order)


@pytest.mark.parametrize("raw", [b"a", b"ab", b"The tower\0 stands in Paris.", b"\0" * 64, b""])
def test_other_bytes_are_not_taken_for_utf_16(raw: bytes) -> None:
    assert texts(raw, "a.txt") == [raw.decode()]


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


def test_rich_text_and_outlook_messages_give_their_text() -> None:
    assert texts(made.RTF, "a.rtf") == ["The tower\n\nIt stands in Paris, café €."]
    russian = rb"{\rtf1\ansi\ansicpg1251 \'cf\'f0\'e8\'e2\'e5\'f2\par}"
    assert texts(russian, "a.rtf") == ["Привет"]
    assert counted(b"plain", "a.rtf") == {"damaged": 1}
    assert counted(rb"{\rtf1 }", "a.rtf") == {"no_text": 1}
    body = "Dear Ann,\r\n\r\nhere it is. Grüße"
    text = "The offer\n\nDear Ann,\n\nhere it is. Grüße"
    assert texts(outlook.message("The offer", body), "a.msg") == [text]
    html = "<p>Dear <b>Ann</b>,</p><p>here it is. Grüße</p>".encode()
    assert texts(outlook.message("The offer", html=html), "a.msg") == [text]
    assert counted(outlook.message(""), "a.msg") == {"no_text": 1}
    assert counted(b"no message", "a.msg") == {"damaged": 1}


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


@pytest.mark.parametrize("suffix", ["txt", "md", "rst", "adoc", "org"])
def test_text_with_markup_is_text(suffix: str) -> None:
    text = "Title\n=====\n\nSome words.\n"
    assert texts(text.encode(), f"a.{suffix}") == [text]


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


def test_a_canvas_is_a_document_without_its_files() -> None:
    cards = [
        {"type": "text", "text": "below", "x": 0, "y": 90},
        {"type": "file", "file": "Notes/a.md", "x": 0, "y": 50},
        {"type": "text", "text": " above ", "x": 0, "y": 0},
    ]
    canvas = json.dumps({"nodes": cards, "edges": []}).encode()
    assert texts(canvas, "a.canvas") == ["above\n\nbelow"]
    assert counted(b"", "a.canvas") == counted(b"{}", "a.canvas") == {"no_text": 1}
    assert counted(b"[1]", "a.canvas") == {"bad_record": 1}


def test_evernotes_export_gives_a_document_per_note() -> None:
    first, second = texts(made.ENEX, "a.enex")
    assert first == "The tower\n\nIt stands in Paris.\n\nC’est tout."
    assert isinstance(second, Unreadable)
    assert counted(made.ENEX[:-300], "a.enex")["bad_record"] == 1
    assert counted(b"<en-export/>", "a.enex") == {"no_text": 1}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("Makefile", ".txt"),
        ("LICENSE", ".txt"),
        ("README.gz", ".txt"),
        ("program", ""),
        ("1700.M1P1.host,S=100:2,S", ".eml"),
        ("1700.M1P1.host,S=100:2,", ".eml"),
        ("Inbox", ".mbox"),
        ("/home/a/x.default/Mail/Local Folders/Projects", ".mbox"),
        ("x.default/ImapMail/imap.example.org/Lists", ".mbox"),
        ("old/Inbox.sbd/Family", ".mbox"),
        ("/home/a/Mail/Projects", ""),
        ("x.default/ImapMail/imap.example.org/Lists.msf", ".msf"),
        ("pkg-1.0/PKG-INFO", ".txt"),
    ],
)
def test_names_without_a_suffix_are_known_by_custom(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


def test_what_programs_leave_beside_documents_is_hidden() -> None:
    names = ("~$Report.docx", ".~lock.a.odt#", "Thumbs.db", "desktop.ini", "a/__pycache__/b.py")
    assert all(map(hidden_part, names))
    assert not any(map(hidden_part, ("Report.docx", "a~b.txt", "settings.ini", "cache.db")))
    assert registry.reason_unread("Inbox.msf") == registry.reason_unread("uv.lock") == "not_text"
