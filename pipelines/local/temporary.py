"""The temporary files of a run's steps, which are removed with the run."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nudge.components.common.core.errors import UserError

LINK, PREFIX = "tmp", "nudge-"
"""While a run is active, a link of this name in its folder points to the folder of its temporary
files, whose name begins with the prefix."""


@contextlib.contextmanager
def temporary_folder(run_folder: Path) -> Iterator[Path]:
    """A folder for the temporary files of a run's steps and of kfp; it is removed with the block.

    It is made where this machine keeps temporary files (on the disk or in the memory that they
    would use anyway) and has a short name. It is not in the run's folder because multiprocessing,
    torch and Ray make sockets in it, whose paths may have at most 107 bytes. A link in the run's
    folder leads to it after a kill. Raises `UserError` if it cannot be made.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    except OSError as error:
        raise UserError(
            f"no folder for temporary files can be made: {error}; free some space, or set TMPDIR"
        ) from None
    link = run_folder / LINK
    try:
        link.unlink(missing_ok=True)  # left from before a reboot
        link.symlink_to(folder)
        yield folder
    finally:
        _remove(link, folder)


def _remove(link: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    link.unlink(missing_ok=True)


def left_behind(home: Path) -> list[Path]:
    """The lock files of runs whose folder has such a link: they are active or were killed."""
    links = (home / "runs").glob(f"*/{LINK}")
    return [link.with_name("lock") for link in links if link.is_symlink()]


def remove_left_behind(lock: Path) -> None:
    """Remove the temporary files of a run that was killed, by the path of its lock file."""
    link = lock.with_name(LINK)
    folder = link.readlink()
    if folder.name.startswith(PREFIX):  # nothing else is ever removed through a link
        _remove(link, folder)
