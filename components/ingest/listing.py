"""From what ``data_uri`` says to URIs, and from a folder of this machine to its files.

A name that exists wins over what it could mean otherwise: a pattern, several URIs, a quoted blank.
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
    """A path of this machine; ``skipped`` says why it is not read, if it is not."""

    path: str
    skipped: str = ""


def named_uris(data_uri: str | Sequence[str]) -> list[str]:
    """The URIs in a setting: a list of them, or a text with one per line or between blanks.

    A line that names an existing file or folder is one URI, blanks included; so is what stands in
    quotation marks, and a blank after a backslash.
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
    """Whether a URI of this machine names something, by its own name or with ``%20`` decoded."""
    return not uri.startswith("package://") and os.path.lexists(local_name(uri))


def local_name(uri: str) -> str:
    """The path that a URI of this machine names; percent signs are decoded in ``file://`` only, and
    only if there is nothing of that very name."""
    path = str(local_path(uri))
    if uri.startswith("file:") and "%" in path and not os.path.lexists(path):
        decoded = unquote(path)
        if os.path.lexists(decoded) or any(mark in decoded for mark in MAGIC):
            return decoded
    return path


def local_files(path: str) -> list[Found]:
    """Every file that a path or pattern names, folders expanded, in a fixed order.

    Linked folders are read like others, but none twice; hidden folders and files, pipes, devices
    and links to nothing are named with the reason why they are skipped.
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
    # A pattern that spells out a dot means hidden names.
    are_hidden_meant = any(part.startswith(".") for part in path[len(fixed) :].split(os.sep))
    for match in sorted(glob.iglob(path, recursive=True, include_hidden=are_hidden_meant)):
        hidden = "" if are_hidden_meant else hidden_part(os.path.relpath(match, fixed or os.curdir))
        if hidden or os.path.isdir(match):
            continue
        # Through a link that leads up, a pattern finds the same file again and again.
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
    """The folder before the first part of a pattern that has a wildcard."""
    fixed: list[str] = []
    for part in pattern.split(os.sep)[:-1]:
        if any(mark in part for mark in MAGIC):
            break
        fixed.append(part)
    return os.sep.join(fixed) + (os.sep if fixed else "")
