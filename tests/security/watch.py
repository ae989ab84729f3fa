"""What other users of a machine see of a command's processes, and what these pass to each other."""

import threading
import time
from pathlib import Path

import psutil

from nudge.components.common.local import processes

Seen = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]
"""A process's arguments and variables."""


class Watch:
    """Collects the arguments and variables of all processes of a command and of a home's servers,
    from `with` until its end. ``children`` and ``servers`` leave out the command itself."""

    def __init__(self, pid: int, home: Path) -> None:
        self._root, self._home = psutil.Process(pid), home
        self._command = tuple(self._root.cmdline())
        self.arguments: set[tuple[str, ...]] = {self._command}
        self.children: set[Seen] = set()
        self.servers: set[Seen] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            try:
                for each in self._root.children(recursive=True):
                    self._note(each, self.children)
            except psutil.NoSuchProcess:
                pass
            for record in processes.records(self._home):
                if process := record.process():
                    self._note(process, self.servers)
            time.sleep(0.1)

    def _note(self, process: psutil.Process, seen: set[Seen]) -> None:
        try:
            arguments, variables = tuple(process.cmdline()), process.environ()
            # Between fork and exec a child is still a copy of the command.
            if arguments and arguments != self._command and tuple(process.cmdline()) == arguments:
                self.arguments.add(arguments)
                seen.add((arguments, tuple(sorted(variables.items()))))
        except (psutil.Error, OSError):
            return
