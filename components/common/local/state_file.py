"""Files in which nudge keeps its own state: a damaged one is reported with a way forward.

A file below NUDGE_HOME may be truncated, empty or full of NULs after a power cut or a full disk, or
come from another version of nudge. Whoever reads one uses this module, so that no damage ends in a
traceback.
"""

import json
from pathlib import Path
from typing import Any

from nudge.components.common.core.errors import UserError


class Damaged(UserError):
    """A file of nudge's state cannot be read; the text says what to do about it."""


def damaged(path: Path, why: str, remedy: str) -> Damaged:
    """The error for one file: what is wrong with it, and the ``remedy`` as an imperative."""
    return Damaged(f"{path} is damaged ({why}); {remedy}")


def read_text(path: Path, remedy: str) -> str:
    """The text of a file, not empty; raises `Damaged`, or `FileNotFoundError` if it is missing."""
    try:
        data = path.read_bytes()
    except (IsADirectoryError, PermissionError) as error:
        raise damaged(path, str(error.strerror), remedy) from None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise damaged(path, "it is not UTF-8 text", remedy) from None
    if not text.strip():
        raise damaged(path, "it is empty", remedy)
    if "\0" in text:
        raise damaged(path, "it has NUL bytes", remedy)
    return text


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; raises as `read_text` does, and `Damaged` for anything else."""
    text = read_text(path, remedy)
    try:
        value = json.loads(text)
    except ValueError:
        raise damaged(path, "it is not complete JSON", remedy) from None
    if not isinstance(value, dict):
        raise damaged(path, f"it has a JSON {type(value).__name__}, not an object", remedy)
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line; damaged lines are left out, because a kill or
    a full disk leaves an incomplete last one. Empty if the file is missing."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:  # UnicodeDecodeError is one
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
