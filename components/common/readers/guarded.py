"""Runs parsers in a worker process with a time and a memory limit per document.

Parsers of HTML, PDF and office files are third-party code that hostile or odd bytes can keep busy:
1.1 MB of HTML ran for more than 100 seconds. A thread or a signal cannot stop C code; killing a
process can.
"""

import atexit
import os
import pickle
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.readers.unreadable import Unreadable

SECONDS = 60.0
IMPORT_SECONDS = 600.0
MEMORY_BYTES = 2 << 30
"""Memory that a parser may allocate for one document, in addition to its libraries."""


class _Stuck(Exception):
    """The worker did not answer in time."""


class Worker:
    """One worker process, started when needed and restarted after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def call(
        self, function: Callable[..., Any], raw: bytes, arguments: tuple[Any, ...], needs: Any
    ) -> Any:
        """The worker's result of ``function(raw, *arguments)``, or an `Unreadable`."""
        task = pickle.dumps((needs, function, raw, arguments, SECONDS, MEMORY_BYTES))
        with self._lock:
            try:
                process = self._started()
                assert process.stdin is not None
                process.stdin.write(struct.pack("<Q", len(task)) + task)
                process.stdin.flush()
                # The first frame names a missing import.
                missing = pickle.loads(self._frame(process, time.monotonic() + IMPORT_SECONDS))
                if missing is not None:
                    raise UserError(
                        f"reading this kind of file needs the Python package {missing}, which is "
                        "not installed; install the extra: pip install 'nudge-lm[data]'"
                    )
                return pickle.loads(self._frame(process, time.monotonic() + SECONDS))
            except _Stuck:
                self.close()
                return Unreadable("too_slow", f"more than {SECONDS:g} s", len(raw))
            except (EOFError, OSError):
                self.close()
                return Unreadable("reader_crashed", "its process ended", len(raw))
            except UserError:
                raise
            except BaseException:
                self.close()  # a late answer would belong to this document
                raise

    def close(self) -> None:
        """Kill the worker, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # the buffered data has no reader any more
                        continue

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nudge.components.common.readers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_environment(),
            )
        return self._process

    @staticmethod
    def _frame(process: "subprocess.Popen[bytes]", deadline: float) -> bytes:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)

            def exactly(size: int) -> bytes:
                parts = bytearray()
                while len(parts) < size:
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        raise _Stuck
                    data = os.read(descriptor, min(size - len(parts), 1 << 20))
                    if not data:
                        raise EOFError
                    parts += data
                return bytes(parts)

            return exactly(struct.unpack("<Q", exactly(8))[0])


def _environment() -> dict[str, str]:
    """The variables that a parser needs; no credentials."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "HOME", "TMPDIR", "VIRTUAL_ENV")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    return {**found, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


_worker = Worker()
atexit.register(_worker.close)


def guarded(
    function: Callable[..., Any], raw: bytes, *arguments: Any, needs: tuple[str, ...] = ()
) -> Any:
    """The result of ``function(raw, *arguments)``, or an `Unreadable` with the reason.

    ``function`` is a module-level function. It runs in this process's worker, which is killed after
    `SECONDS` and may use at most `MEMORY_BYTES`. ``needs`` names the libraries that it imports;
    they are loaded before both limits apply. Raises `UserError` if one is not installed.
    """
    return _worker.call(function, raw, arguments, needs)
