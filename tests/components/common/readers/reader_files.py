"""Small files of every supported kind, written by the formats' own libraries."""

import base64
import gzip
import io
import json
import mailbox
import tempfile
import zipfile
import zlib
from email.message import EmailMessage
from pathlib import Path

import docx
import openpyxl
import pptx
import pyarrow
import pyarrow.parquet
from pptx.util import Inches

from tests.components.common.readers import outlook

PDF = (
    b"%PDF-1.1\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
    b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 99]/Contents 4 0 R/Resources"
    b"<</Font<</F<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>>>endobj\n"
    b"4 0 obj<</Length 44>>stream\nBT /F 18 Tf 9 40 Td (The tower is in Paris) Tj ET\n"
    b"endstream endobj\ntrailer<</Root 1 0 R>>"
)

XLS = zlib.decompress(
    base64.b64decode(
        "eNrtWE1oE1EQ/t4maX5o0iSmQiuEJWDV2ot48dKuCrZ4sEQRFBE0aRYMLYlsVvw5aLXmKAieFC+FXrxUvfiDHtST"
        "B6GiB0EQEj32JCh4aLPOm93VtObQgIZa9lvevNl5M/t+Zua93X27kKjNPuyvYxVG4EPDCqOrSSaohN2bOKjdsiTr"
        "1iEqlof/CuEQObIrgGfRN0HpQ+nvOhQ88L8kCnymchJnMV4u6WoHsZ/HkBNyDMPCT7Gn4C6VGPp4XEmmE0w3Mb3P"
        "us+Z7mXJDabDpFsTJ7CgjQ/uceL4uJLhthhRgcds85Elu9CL1zKOr9wUtm4A+4xibmp9NqT93ZgDeW5ML+lGbqqG"
        "FLlwDt8tFfjm5uoL1ZN3Vi5A8h8r5cEW8luKH5iGdVrIQKwiioZPtgQo4Uy9UqUIfRWw8zJrFCf0yhJGOUdloXgt"
        "Fsje1C+YtC8fPaOrZvm8biSBg6ZaMXOlQkUtltRszihW6Cl5Q88VyDB/zjR1IyJ3c87++Irsj3JOdBMtoIf5BGdG"
        "nPb3pXtf3x3KZ7VTLJnmHd8+F7bKicDCVWlBxjFu4bmw7iDTnUyv8VO3MN/PNEUTpnog2+swozOsc51bB6if3Yz3"
        "2rYmfjvx1cXDT9LVL9oO4ufH6pdS8x+0WWTonCqQvbxmMCSGxJ3bEk81txbODvKJad8fu0lIiTtjt5zDrwfLiDCb"
        "YGrfydURjr5YpX9ZibAsgbSjL36tptRXWugrrJ9x9O3Vl6s4oiTxSDbS3vYbnfChskF9KOcqV9z24aKvtQ9tr0n9"
        "gKNv+zDm+gStfOLBgwcPHjx48LB+IZx3O/mO6ecPD/sNMuj811mm0vB+k2xYHEGZLpM+Sw+gRLWBi23Fz2YEhPss"
        "sUYb93+hxDHq3cAk8jyOybbjl74ARPN81mwY/3sp1G7/jXbG+Y/7/wku9gPB"
    )
)
"""Two sheets in the format of Excel 97, written by xlwt: Notes (id, text) and Prices."""
RTF = rb"{\rtf1\ansi\ansicpg1252 The tower\par\par It stands in Paris, caf\'e9 \u8364?.\par}"

ENEX = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<!DOCTYPE en-export SYSTEM "http://xml.evernote.com/pub/evernote-export4.dtd">\n'
    "<en-export><note><title>The tower</title><content>"
    "<![CDATA[<?xml version='1.0' encoding='UTF-8' standalone='no'?>"
    '<!DOCTYPE en-note SYSTEM "http://xml.evernote.com/pub/enml2.dtd">'
    "<en-note><div>It stands in <b>Paris</b>.</div><div>C\u2019est tout.</div></en-note>]]>"
    "</content><resource><data encoding='base64'>AAAA</data></resource></note>"
    "<note><title></title><content><![CDATA[<en-note/>]]></content></note></en-export>"
).encode()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, raw in members.items():
            file.writestr(name, raw)
    return out.getvalue()


def word() -> bytes:
    document = docx.Document()
    document.add_heading("The tower")
    document.add_paragraph("It stands in Paris.")
    table = document.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "height", "330 m"
    document.add_paragraph("It was built in 1889.")
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def slides() -> bytes:
    deck = pptx.Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[5])
    slide.shapes.title.text = "The tower"
    box = slide.shapes.add_textbox(Inches(1), Inches(1), Inches(4), Inches(1))
    box.text_frame.text = "It stands in Paris."
    slide.notes_slide.notes_text_frame.text = "Mention the year 1889."
    out = io.BytesIO()
    deck.save(out)
    return out.getvalue()


def workbook(rows: list[list[object]]) -> bytes:
    book = openpyxl.Workbook()
    book.active.title = "Facts"
    for row in rows:
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def open_document() -> bytes:
    content = (
        '<office:document-content xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0" '
        'xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0"><office:body><office:text>'
        "<text:h>The tower</text:h><text:p>It stands<text:s text:c='2'/>in "
        "<text:span>Paris</text:span>.</text:p></office:text></office:body>"
        "</office:document-content>"
    )
    return zipped(
        {"mimetype": b"application/vnd.oasis.opendocument.text", "content.xml": content.encode()}
    )


def open_sheet(rows: list[list[str]]) -> bytes:
    lines = "".join(
        "<table:table-row>"
        + "".join(
            f"<table:table-cell office:value-type='string'><text:p>{cell}</text:p>"
            "</table:table-cell>"
            for cell in row
        )
        + "</table:table-row>"
        for row in rows
    )
    spaces = "".join(
        f' xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "table", "text")
    )
    content = (
        f"<office:document-content{spaces}><office:body><office:spreadsheet>"
        f'<table:table table:name="Notes">{lines}</table:table>'
        "</office:spreadsheet></office:body></office:document-content>"
    )
    kind = b"application/vnd.oasis.opendocument.spreadsheet"
    manifest = (
        '<manifest:manifest xmlns:manifest="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0"/>'
    )
    return zipped(
        {
            "mimetype": kind,
            "content.xml": content.encode(),
            "META-INF/manifest.xml": manifest.encode(),
        }
    )


def book() -> bytes:
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0">'
        '<rootfiles><rootfile full-path="O/book.opf" media-type="x"/></rootfiles></container>'
    )
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf"><manifest>'
        '<item id="b" href="two%20b.xhtml"/><item id="a" href="one.xhtml"/></manifest>'
        '<spine><itemref idref="a"/><itemref idref="b"/></spine></package>'
    )
    page = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title>x</title></head>'
    return zipped(
        {
            "META-INF/container.xml": container.encode(),
            "O/book.opf": package.encode(),
            "O/two b.xhtml": f"{page}<body><p>The second chapter.</p></body></html>".encode(),
            "O/one.xhtml": (
                f"{page}<body><h1>One</h1><p>The <i>first</i> chapter.</p></body></html>".encode()
            ),
        }
    )


def notebook() -> bytes:
    cells = [
        {"cell_type": "markdown", "source": ["# The tower\n", "It stands in Paris."]},
        {"cell_type": "code", "source": "height = 330", "outputs": [{"text": "secret output"}]},
    ]
    return json.dumps({"cells": cells, "nbformat": 4}).encode()


def message(subject: str = "The tower", html: bool = False) -> EmailMessage:
    made = EmailMessage()
    made["Subject"], made["From"] = subject, "someone@example.com"
    body = "It stands in Paris, où tout est près."
    if html:
        made.set_content(f"<html><body><p>{body}</p></body></html>", subtype="html")
    else:
        made.set_content(body)
        made.add_alternative(f"<p>{body}</p>", subtype="html")
        made.add_attachment(b"\0\1", maintype="application", subtype="pdf", filename="a.pdf")
    return made


def archive_of_mail() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        box = mailbox.mbox(Path(folder) / "a.mbox")
        box.add(message("One"))
        quoted = EmailMessage()
        quoted["Subject"] = "Two"
        quoted.set_content("Before.\n\nFrom here on it is quoted.\n")
        box.add(quoted)
        box.close()
        return (Path(folder) / "a.mbox").read_bytes()


def table(**columns: object) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def arrow(is_file: bool = False) -> bytes:
    rows = pyarrow.table({"id": ["a", "b"], "text": ["one", "two"]})
    out = io.BytesIO()
    opener = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    with opener(out, rows.schema) as writer:
        writer.write_table(rows)
    return out.getvalue()


def lines(count: int) -> bytes:
    return b"".join(b'{"text": "number %d", "id": "n%d"}\n' % (n, n) for n in range(count))


def samples() -> dict[str, bytes]:
    """One file of each kind."""
    return {
        ".txt": "täxt".encode(),
        ".text": b"text",
        ".md": b"---\na: b\n---\n# text\n",
        ".rst": b"text\n====\n",
        ".adoc": b"= text\n",
        ".org": b"* text\n",
        ".html": b"<html><body><p>text</p></body></html>",
        ".xml": b"<mediawiki><page><title>a</title><ns>0</ns><revision><text>'''One''' [[two]]"
        b"</text></revision></page></mediawiki>",
        ".enex": ENEX,
        ".pdf": PDF,
        ".jsonl": lines(3),
        ".json": b'[{"text": "one"}, {"text": "two"}]',
        ".csv": b'id,text\n1,"a\nb"\n2,c\n',
        ".tsv": b"id\ttext\n1\ta b\n2\tc\n",
        ".parquet": table(id=["1"], text=["abc"]),
        ".arrow": arrow(),
        ".docx": word(),
        ".pptx": slides(),
        ".xlsx": workbook([["id", "text"], [1, "one"]]),
        ".xls": XLS,
        ".ods": open_sheet([["id", "text"], ["1", "one"]]),
        ".odt": open_document(),
        ".rtf": RTF,
        ".msg": outlook.message("The tower", "It stands in Paris."),
        ".epub": book(),
        ".ipynb": notebook(),
        ".canvas": b'{"nodes": [{"type": "text", "text": "one", "x": 0, "y": 0}]}',
        ".eml": message().as_bytes(),
        ".mbox": archive_of_mail(),
        ".zip": zipped({"a.txt": b"one", "b.jsonl": lines(2), "c.txt.gz": gzip.compress(b"x")}),
        ".py": b"x = {'a': 'b'}",
        ".c": b"int main;",
    }
