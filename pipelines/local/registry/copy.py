"""A copy of the registry's database, made at each start, so that a damaged one can be replaced."""

import contextlib
import sqlite3
from datetime import datetime
from pathlib import Path

from nudge.components.common.local.state_file import damaged


def copy_of(database: Path) -> Path:
    """The path of a database's copy."""
    return database.with_suffix(".copy.sqlite")


def check(database: Path) -> None:
    """Raise `Damaged`, with the command that restores the copy, unless the database can be used.

    Before the first start, not even its folder is there.
    """
    if not database.parent.is_dir():
        return
    if not database.is_file() or not database.stat().st_size:
        raise damaged(database, "it is missing or empty", _remedy(database))
    try:
        with contextlib.closing(_opened(database)) as opened:
            (answer,) = opened.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        answer = str(error)
    if answer != "ok":
        raise damaged(database, answer, _remedy(database))


def keep_copy(database: Path) -> None:
    """Check a database and copy it, complete or not at all; raises as `check` does."""
    if not database.exists():
        return
    check(database)
    part = database.with_suffix(".part-copy.sqlite")
    part.unlink(missing_ok=True)
    try:
        with (
            contextlib.closing(_opened(database)) as opened,
            contextlib.closing(sqlite3.connect(part)) as target,
        ):
            opened.backup(target)
        part.chmod(0o600)
        part.replace(copy_of(database))
    except (sqlite3.OperationalError, OSError):  # no space: an older copy is better than none
        part.unlink(missing_ok=True)


def _opened(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{database}?mode=ro", uri=True)


def _remedy(database: Path) -> str:
    copy = copy_of(database)
    if not copy.is_file():
        return (
            f"there is no copy of it, so move its folder away (mv {database.parent} "
            f"{database.parent}.damaged) and rerun your recipes, which register their models again"
        )
    then = datetime.fromtimestamp(copy.stat().st_mtime)
    return (
        f"its copy is of {then:%Y-%m-%d %H:%M}: run `nudge services down`, then `rm -f {database} "
        f"{database}-wal {database}-shm` and `cp {copy} {database}`"
    )
