"""PDF files: the text layer of all pages."""

from pathlib import PurePosixPath
from typing import IO

from nudge.components.common.readers.records import Page, ReadOptions, Record, Records, whole
from nudge.components.common.readers.unreadable import Unreadable


def read_pdf(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """One document per file."""
    raw = whole(stream)
    text = raw if isinstance(raw, Unreadable) else Page(raw, pdf_text, ("pypdfium2",))
    yield Record(PurePosixPath(name).name, text)


def pdf_text(raw: bytes) -> str | Unreadable:
    """The text layer of a PDF."""
    import pypdfium2

    try:
        with pypdfium2.PdfDocument(raw) as document:
            pages = [page.get_textpage().get_text_bounded() for page in document]
    except pypdfium2.PdfiumError as error:
        return Unreadable("damaged", str(error), len(raw))
    return "\n\n".join(pages).strip() or Unreadable(
        "no_text_layer",
        "probably a scan; add a text layer first: pip install 'nudge-lm[ocr]', then "
        "ocrmypdf IN.pdf OUT.pdf",
        len(raw),
    )
