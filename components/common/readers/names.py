"""What a file's name says about it: its format, its compression, and whether it is hidden."""

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.artifacts.corpus import zstd

COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": zstd.ZstdFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
NOT_TEXT = frozenset((
    ".a", ".aac", ".avi", ".avif", ".bin", ".bmp", ".class", ".dll", ".dylib", ".eot",
    ".exe", ".flac", ".gif", ".gguf", ".heic", ".ico", ".iso", ".jar", ".jpeg", ".jpg", ".lnk",
    ".lock", ".m4a", ".mkv", ".mov", ".mp3", ".mp4", ".msf", ".npy", ".npz", ".o", ".ogg", ".onnx",
    ".opus", ".otf",
    ".png", ".pt", ".pyc", ".pyd", ".pyo", ".safetensors", ".so", ".svg", ".tif",
    ".tiff", ".ttf", ".typed", ".wasm", ".wav", ".webm", ".webp", ".wheel", ".whl", ".woff",
    ".woff2",
))  # fmt: skip
"""Suffixes of files without text; they are counted, but not as a loss of text."""
CONVERTED = {
    **dict.fromkeys(
        (".doc", ".docm", ".dot", ".dotx", ".fodt", ".wpd", ".wps"),
        "soffice --headless --convert-to docx",
    ),
    **dict.fromkeys(
        (".pot", ".potx", ".pps", ".ppsx", ".ppt", ".pptm"), "soffice --headless --convert-to pptx"
    ),
    **dict.fromkeys((".pages", ".key", ".numbers"), "Apple's programs export .docx, .pptx, .xlsx"),
    **dict.fromkeys((".mobi", ".azw", ".azw3", ".fb2", ".lit"), "Calibre's ebook-convert to .epub"),
    **dict.fromkeys((".pst", ".ost"), "readpst writes .mbox files"),
    ".djvu": "djvutxt writes a .txt",
    ".one": "OneNote exports .docx",
    ".chm": "archmage writes .html files",
    **dict.fromkeys((".tar", ".tgz", ".rar", ".7z"), "unpack it"),
}
"""Suffixes of texts that nudge does not read, and how to convert them."""
HIDDEN = frozenset(("__pycache__", "__MACOSX", "node_modules"))
"""Folders that tools create; skipped like folders whose names begin with a dot."""
WITHOUT_SUFFIX = frozenset(
    (
        *("authors", "changelog", "changes", "contributors", "copying", "history", "install"),
        *("license", "licence", "maintainers", "news", "notice", "pkg-info", "readme", "thanks"),
        "todo",
        *("brewfile", "containerfile", "dockerfile", "gemfile", "jenkinsfile", "justfile"),
        *("makefile", "procfile", "rakefile", "vagrantfile"),
    )
)
"""Names of text files that have no suffix by custom, in lower case."""
MAILBOXES = frozenset(
    ("archives", "drafts", "inbox", "junk", "sent", "sent items", "templates", "unsent messages")
)
"""Names of Thunderbird's mailboxes, in lower case; they have no suffix."""
JUNK = frozenset(("thumbs.db", "desktop.ini"))
"""What Windows leaves in folders, in lower case."""
MAILDIR = re.compile(r":2,[A-Za-z]*$")
"""How a Maildir's name of a message that was seen ends (https://cr.yp.to/proto/maildir.html)."""


def suffix_of(name: str) -> str:
    """The suffix that names the format, without the compression's suffix.

    Files that have none by custom get one: ``LICENSE`` is text, a message of a Maildir is mail, and
    a file in a folder of Thunderbird is a mailbox.
    """
    path = PurePosixPath(name)
    if MAILDIR.search(path.name):
        return ".eml"
    if path.suffix.lower() in COMPRESSED:
        path = PurePosixPath(path.stem)
    if not path.suffix and path.name.lower() in WITHOUT_SUFFIX:
        return ".txt"
    if not path.suffix and (path.name.lower() in MAILBOXES or _is_thunderbirds(path.parts[:-1])):
        return ".mbox"
    return path.suffix.lower()


def _is_thunderbirds(folders: Sequence[str]) -> bool:
    """Whether a path leads into the mail of a Thunderbird profile."""
    is_in_profile = "ImapMail" in folders or {"Mail", "Local Folders"} <= set(folders)
    return is_in_profile or any(folder.endswith(".sbd") for folder in folders)


def hidden_part(path: str) -> str:
    """The first part of a relative path that is hidden, if any."""
    return next((part for part in PurePosixPath(path).parts if _is_hidden(part)), "")


def _is_hidden(part: str) -> bool:
    # Word writes "~$Report.docx" beside an open Report.docx.
    return part.startswith((".", "~$")) or part in HIDDEN or part.lower() in JUNK
