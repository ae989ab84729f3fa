"""The readers of training text read the guards too, and anything unreadable is an error."""

import codecs
import json
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.evaluate.settings import Guard
from nudge.components.evaluate.texts import guard_documents
from tests.components.common.readers import reader_files as made

TEXTS = [f"Guard text number {n}" for n in range(20)]


def read(path: Path) -> list[str]:
    return [document.text for document in guard_documents(Guard(name="g", uri=str(path)))]


def lines(texts: list[str | None]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_json_lines_may_start_with_a_bom(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + lines([*TEXTS]))
    assert read(path) == TEXTS
    path.write_bytes(lines([*TEXTS]).decode().encode("utf-16"))
    assert read(path) == TEXTS


def test_a_null_is_rejected_with_its_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([*TEXTS[:6], None, *TEXTS[6:]]))
    with pytest.raises(UserError, match=r"guards g: a\.jsonl, row 7 of .* cannot be read: no_text"):
        read(path)


def test_guards_are_read_in_every_format_without_hidden_files(tmp_path: Path) -> None:
    folder = tmp_path / "guards [1]"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "a.txt").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "a.docx").write_bytes(made.word())
    (folder / "b.csv").write_text("id,text\n" + "".join(f"{n},{t}\n" for n, t in enumerate(TEXTS)))
    (folder / "c.log").write_text("a kind that nobody knows is text")
    found = read(folder)
    assert found[0].startswith("The tower\n\nIt stands in Paris.")
    assert found[1:] == [*TEXTS, "a kind that nobody knows is text"]


def test_an_unterminated_quote_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'id,text\n1,"Bread and more\n' + "".join(f"{n},{t}\n" for n, t in enumerate(TEXTS))
    )
    with pytest.raises(UserError, match=r"a\.csv, row 1 of .*unclosed_quote \(row 1: the quot"):
        read(path)
