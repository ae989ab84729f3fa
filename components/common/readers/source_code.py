"""Source code as text; a Python module that is only a mapping of texts gives one per entry."""

import ast
import re
from pathlib import PurePosixPath
from typing import IO

from nudge.components.common.readers.encodings import decoded
from nudge.components.common.readers.guarded import guarded
from nudge.components.common.readers.records import ReadOptions, Record, Records, whole
from nudge.components.common.readers.unreadable import Unreadable

SUFFIXES = [
    ".asm",
    ".bash",
    ".bat",
    ".bib",
    ".c",
    ".cc",
    ".cfg",
    ".clj",
    ".cmake",
    ".conf",
    ".cpp",
    ".cs",
    ".css",
    ".cu",
    ".cuh",
    ".cxx",
    ".dart",
    ".diff",
    ".el",
    ".erl",
    ".ex",
    ".exs",
    ".f90",
    ".go",
    ".gradle",
    ".graphql",
    ".groovy",
    ".h",
    ".hh",
    ".hpp",
    ".hs",
    ".in",
    ".ini",
    ".java",
    ".jl",
    ".js",
    ".jsx",
    ".kt",
    ".kts",
    ".lean",
    ".less",
    ".lisp",
    ".lua",
    ".m",
    ".mjs",
    ".ml",
    ".mm",
    ".nim",
    ".nix",
    ".pas",
    ".patch",
    ".php",
    ".pl",
    ".pm",
    ".po",
    ".properties",
    ".proto",
    ".ps1",
    ".pxd",
    ".pyi",
    ".pyx",
    ".r",
    ".rb",
    ".rs",
    ".s",
    ".sass",
    ".scala",
    ".scm",
    ".scss",
    ".sh",
    ".sql",
    ".sv",
    ".svelte",
    ".swift",
    ".tcl",
    ".tex",
    ".tf",
    ".toml",
    ".ts",
    ".tsx",
    ".v",
    ".vb",
    ".vhd",
    ".vue",
    ".yaml",
    ".yml",
    ".zig",
    ".zsh",
]
MAPPING = re.compile(r"""\s*(?:\#[^\n]*\n\s*|\"{3}.*?\"{3}\s*)*(?:\w+\s*=\s*)?\{""", re.DOTALL)
SHORTEST_MEAN = 20
"""The least mean length of a mapping's texts in characters; settings are shorter."""


def read_source(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The file, unchanged."""
    raw = whole(stream)
    if isinstance(raw, Unreadable):
        text, encoding = raw, ""
    else:
        text, encoding = decoded(raw, options)  # type: ignore[assignment]
    yield Record(PurePosixPath(name).name, text, encoding=encoding)


def read_python(stream: IO[bytes], name: str, options: ReadOptions) -> Records:
    """The module as text, or the texts of the single mapping that it consists of.

    It is parsed, in a worker, and never executed.
    """
    raw = whole(stream)
    if isinstance(raw, Unreadable):
        yield Record(PurePosixPath(name).name, raw)
        return
    text, encoding = decoded(raw, options)
    if isinstance(text, str) and MAPPING.match(text):
        texts = guarded(texts_by_name, text.encode())
        if isinstance(texts, dict):
            for key, value in texts.items():
                yield Record(key, value, encoding=encoding)
            return
    yield Record(PurePosixPath(name).name, text, encoding=encoding)


def texts_by_name(raw: bytes) -> dict[str, str] | None:
    """The mapping of a module that contains only a docstring and one literal dict of texts."""
    try:
        body = ast.parse(raw).body
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:]
        if len(body) != 1 or not isinstance(body[0], ast.Assign | ast.Expr):
            return None
        if not isinstance(body[0].value, ast.Dict):
            return None
        mapping = ast.literal_eval(body[0].value)
    except (SyntaxError, ValueError, TypeError, RecursionError):
        return None
    texts = {str(key): value for key, value in mapping.items() if isinstance(value, str)}
    if not mapping or len(texts) != len(mapping):
        return None
    return texts if sum(map(len, texts.values())) >= SHORTEST_MEAN * len(texts) else None
