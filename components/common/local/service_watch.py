"""``python -m ....service_watch HOME``: stop services whose home was deleted.

A service's process carries its home and name in its environment, so it is found when its record is
gone or damaged. Each start of a service starts this program, and all but one per home exit at once.
Every few seconds it checks that each service still has its record, and ends those that do not
(somebody deleted the home, or the record). It exits after the last service.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME, NAME, ADDRESS = "NUDGE_SERVICE_HOME", "NUDGE_SERVICE_NAME", "NUDGE_SERVICE_ADDRESS"
LOCK = "watch.lock"
POLL_S = 2.0
LOOKS = 2
"""Checks in a row that must miss a record, because it is written just after the start."""
KILL_AFTER = 5
"""Checks after which a process that ignores SIGTERM gets SIGKILL."""


@dataclass(frozen=True)
class Marked:
    """The first process of a service, as its own environment describes it."""

    pid: int
    name: str
    address: str


def marked(home: Path) -> Iterator[Marked]:
    """The running services of a home, by their environment; other users' are never seen."""
    wanted = str(home).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            lines = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        values = dict(line.split(b"=", 1) for line in lines if line.startswith(b"NUDGE_SERVICE_"))
        if values.get(HOME.encode()) != wanted:
            continue
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            if os.getsid(pid) == pid:  # not one of its children
                name, address = (values.get(each.encode(), b"") for each in (NAME, ADDRESS))
                yield Marked(
                    pid, name.decode("utf-8", "replace"), address.decode("utf-8", "replace")
                )


def has_record(home: Path, each: Marked) -> bool:
    """Whether a service's record names its process; a damaged record counts as its own."""
    path = home / "services" / f"{each.name}.json"
    try:
        return bool(json.loads(path.read_bytes())["pid"] == each.pid)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return path.exists()


def watch(home: Path) -> None:
    """End the services of a home whose record is gone; returns once no service is left."""
    while True:
        try:
            with (home / "services" / LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _until_idle(home)
        except FileNotFoundError:  # the home was deleted before this could look
            _until_idle(home)
        except OSError:  # another one watches
            return
        if not any(marked(home)):  # one that was started just now
            return


def _until_idle(home: Path) -> None:
    missed: dict[int, int] = {}
    idle = 0
    while idle < LOOKS:
        time.sleep(POLL_S)
        found = list(marked(home))
        idle = 0 if found else idle + 1
        lost = {each.pid for each in found if not has_record(home, each)}
        missed = {pid: missed.get(pid, 0) + 1 for pid in lost}
        for pid, looks in missed.items():
            if looks >= LOOKS:
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL if looks > KILL_AFTER else signal.SIGTERM)


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
