"""Turns ``data_uri`` into URIs, and a local folder into its files.

An existing name wins over any other reading of it: a pattern, several URIs, a quoted blank.
"""

import glob
import os
import re
import shlex
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from nudge.components.common.core.uris import is_local, local_path

MAGIC = "*?["


class Found(NamedTuple):
    """A local path; ``skipped`` is the reason why it is not read, if there is one."""

    path: str
    skipped: str = ""


def named_uris(data_uri: str | Sequence[str]) -> list[str]:
    """The URIs in a setting: a list, or a text in which lines or blanks separate them.

    A line that names an existing file or folder is one URI, blanks included. Text in quotation
    marks is one URI too, and a backslash before a blank keeps it in the URI.
    """
    if not isinstance(data_uri, str):
        return [uri.strip() for uri in data_uri if uri.strip()]
    found: list[str] = []
    for line in filter(None, map(str.strip, data_uri.splitlines())):
        if len(line.split()) > 1 and is_local(line) and exists(line):
            found.append(line)
            continue
        parts = line.split()
        if re.search(r"""(^|\s)["']|\\\s""", line):
            try:
                parts = shlex.split(line)
            except ValueError:  # an apostrophe in a name
                parts = line.split()
        found += parts
    return found


def exists(uri: str) -> bool:
    """Whether a local URI names something, literally or with ``%20`` decoded."""
    return not uri.startswith("package://") and os.path.lexists(local_name(uri))


def local_name(uri: str) -> str:
    """The path of a local URI. Percent signs are decoded only in ``file://`` URIs, and only if no
    file has the literal name."""
    path = str(local_path(uri))
    if uri.startswith("file:") and "%" in path and not os.path.lexists(path):
        decoded = unquote(path)
        if os.path.lexists(decoded) or any(mark in decoded for mark in MAGIC):
            return decoded
    return path


def local_files(path: str) -> list[Found]:
    """Every file that a path or pattern names, with folders expanded, in a fixed order.

    Linked folders are read like others, but no folder is read twice. Hidden folders and files,
    pipes, devices and broken links are listed with the reason why they are skipped.
    """
    from nudge.components.common.readers import hidden_part

    visited: set[str] = set()
    if os.path.lexists(path):
        if os.path.isdir(path):
            return list(_walk(path, visited))
        return [Found(path, _unread_kind(path))]
    if not any(mark in path for mark in MAGIC):
        return []
    fixed = _fixed_part(path)
    found: dict[str, Found] = {}
    # A pattern with an explicit dot asks for hidden names.
    are_hidden_meant = any(part.startswith(".") for part in path[len(fixed) :].split(os.sep))
    for match in sorted(glob.iglob(path, recursive=True, include_hidden=are_hidden_meant)):
        hidden = "" if are_hidden_meant else hidden_part(os.path.relpath(match, fixed or os.curdir))
        if hidden or os.path.isdir(match):
            continue
        # Through a link to a parent folder, a pattern finds the same file many times.
        real = os.path.join(os.path.realpath(os.path.dirname(match)), os.path.basename(match))
        found.setdefault(real, Found(match, _unread_kind(match)))
    return list(found.values())


def _walk(folder: str, visited: set[str]) -> Iterator[Found]:
    from nudge.components.common.readers import hidden_part

    real = os.path.realpath(folder)
    visited.add(real)
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path = os.path.join(folder, name)
        if hidden_part(name):
            yield Found(path, "hidden")
        elif os.path.isdir(path):
            target = os.path.realpath(path)
            if target in visited or (os.path.islink(path) and _is_inside(real, target)):
                yield Found(path, "linked_folder")
            elif not os.access(path, os.R_OK | os.X_OK):
                yield Found(path, "not_permitted")
            else:
                yield from _walk(path, visited)
        else:
            yield Found(path, _unread_kind(path))


def _is_inside(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _unread_kind(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "broken_link"
    if not stat.S_ISREG(mode):
        return "not_a_file"
    return "" if os.access(path, os.R_OK) else "not_permitted"


def _fixed_part(pattern: str) -> str:
    """The folder before the first part of a pattern with a wildcard."""
    fixed: list[str] = []
    for part in pattern.split(os.sep)[:-1]:
        if any(mark in part for mark in MAGIC):
            break
        fixed.append(part)
    return os.sep.join(fixed) + (os.sep if fixed else "")
