"""NUDGE_HOME belongs to one user of this machine; other users can neither read nor change it."""

import contextlib
import os
import stat
from pathlib import Path

from nudge.components.common.core.environment import in_pod
from nudge.components.common.core.errors import UserError

PRIVATE_UMASK = 0o077
CONTAINER_UIDS = 1_000_000_000
"""From here on are the user ids of the containers that root's runs start; no person has one."""


def private_home(home: Path) -> None:
    """Make ``home``, where nudge keeps its state, or close it to other users if it is open to them.

    The folders directly in it are closed too. Raises `OSError` if it cannot be made, and
    `UserError` if it, or something in it, belongs to another user of this machine, who could change
    what is kept there.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if in_pod():  # a volume has an owner of its own, and there is no other user
        _close([home, *home.iterdir()])
        return
    for found in (home.lstat(), home.stat()):  # a link, and what it leads to
        _check_owner(home, found)
    if home.stat().st_uid != os.getuid() and home.stat().st_mode & 0o022:
        raise UserError(
            f"{home} belongs to root, and every user can write there; set NUDGE_HOME to a folder "
            "of your own"
        )
    inside = list(home.iterdir())
    for path in inside:
        with contextlib.suppress(FileNotFoundError):  # another command's temporary file
            _check_owner(home, path.lstat())
    # Others may have put something into a folder that was open until now.
    for folder in _close([home, *inside]):
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                _check_owner(home, path.lstat())


def _check_owner(home: Path, found: os.stat_result) -> None:
    of_container = os.getuid() == 0 and found.st_uid >= CONTAINER_UIDS
    if found.st_uid not in (0, os.getuid()) and not of_container:
        raise UserError(
            f"{home}, or something in it, belongs to another user (uid {found.st_uid}), who could "
            "read and change what is kept there; set NUDGE_HOME to a folder of your own"
        )


def _close(folders: list[Path]) -> list[Path]:
    """Close this user's folders to others; returns those that others could write to."""
    were_open = []
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            found = folder.lstat()
            mine = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode)
            if mine and found.st_mode & 0o077:
                folder.chmod(found.st_mode & 0o700)
                were_open += [folder] if found.st_mode & 0o022 else []
    return were_open
