"""WhatsApp's export of a chat (.txt): a line per message, in the notation of the phone's region."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from nudge.components.common.readers.posts import Post

HEAD = re.compile(
    r"\[?(?P<day>\d{1,4}[./-]\d{1,2}[./-]\d{1,4})\.?,? "
    r"\d{1,2}[:.]\d{2}(?:[:.]\d{2})?(?:[ \u202f]?[AaPp]\.?[Mm]\.?)?(?:\] | - )"
    r"(?:(?P<author>[^:\n]{1,60}): )?(?P<text>.*)"
)
MARKS = re.compile("[\u200e\u200f\u202a-\u202c\u2066-\u2069]")
"""Direction marks, which WhatsApp writes before its own words and around numbers."""
WITHOUT_WORDS = re.compile(
    r"<[^<>]+>$|(this|you deleted this) message( was deleted)?\.?$"
    r"|(image|video|audio|sticker|gif|document|contact card) omitted$",
    re.IGNORECASE,
)
FEWEST = 3


def is_chat(text: str, name: str) -> bool:
    """Whether a text is such an export, from its name or from its first lines."""
    lines = [MARKS.sub("", line) for line in text[:20_000].splitlines() if line.strip()]
    heads = [match for match in map(HEAD.match, lines) if match]
    if not heads or not HEAD.match(lines[0]):
        return False
    file = PurePosixPath(name).name.lower()
    if "whatsapp" in file or file == "_chat.txt":
        return True
    written = [match for match in heads if match["author"] and ", " in match[0][:14]]
    return len(written) >= FEWEST


def posts(text: str) -> Iterator[Post]:
    """The messages; those about the chat itself, such as who joined, are left out."""
    author, day, parts = "", "", [""]
    for line in text.splitlines():
        match = HEAD.match(MARKS.sub("", line))
        if match is None:
            parts.append(line)
            continue
        if author:
            yield Post(author, _words(parts), day)
        author, day, parts = match["author"] or "", match["day"], [match["text"]]
    if author:
        yield Post(author, _words(parts), day)


def _words(parts: list[str]) -> str:
    text = "\n".join(parts).strip()
    return "" if WITHOUT_WORDS.match(text) else text
