"""Text files, mostly one document each: .txt, Markdown, reStructuredText and AsciiDoc."""

import re
from pathlib import PurePosixPath
from typing import IO

import yaml

from nudge.components.common.readers import whatsapp
from nudge.components.common.readers.encodings import decoded
from nudge.components.common.readers.names import suffix_of
from nudge.components.common.readers.posts import days
from nudge.components.common.readers.records import ReadOptions, Record, Records, whole
from nudge.components.common.readers.unreadable import Unreadable

FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?\n)?(---|\.\.\.)[ \t]*(\r?\n|$)", re.DOTALL)
FRONT_MATTER_CHARACTERS = 1 << 16


def read_text(stream: IO[bytes], options: ReadOptions) -> tuple[str | Unreadable, str]:
    """The text of a stream and its encoding (empty for UTF-8)."""
    raw = whole(stream)
    return (raw, "") if isinstance(raw, Unreadable) else decoded(raw, options)


def read_plain(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The file, unchanged; an export of WhatsApp as a document per day."""
    text, encoding = read_text(stream, options)
    if isinstance(text, str) and suffix_of(name) == ".txt" and whatsapp.is_chat(text, name):
        for record in days(whatsapp.posts(text), options):
            yield record._replace(encoding=encoding)
        return
    yield Record(PurePosixPath(name).name, text, encoding=encoding)


def read_markdown(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The file without its YAML front matter, unless the options keep it."""
    text, encoding = read_text(stream, options)
    if isinstance(text, str) and not options.keep_front_matter:
        text = without_front_matter(text)
    yield Record(PurePosixPath(name).name, text, encoding=encoding)


def without_front_matter(text: str) -> str:
    """The text after a leading YAML mapping between ``---`` lines, if it has one."""
    match = FRONT_MATTER.match(text, 0, FRONT_MATTER_CHARACTERS)
    if match is None:
        return text
    try:
        values = yaml.safe_load(match.group(1) or "")
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return text[match.end() :].lstrip("\r\n") if isinstance(values, dict | None) else text
