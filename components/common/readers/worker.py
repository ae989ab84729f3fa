"""The process that `guarded` starts: reads pickled calls from stdin and writes pickled answers."""

import importlib
import os
import pickle
import resource
import struct
import sys
from typing import Any

from nudge.components.common.readers.unreadable import Unreadable


def main() -> None:
    """Answer calls until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's output must not end up among the answers
    while header := sys.stdin.buffer.read(8):
        (size,) = struct.unpack("<Q", header)
        needs, *call, seconds, memory = pickle.loads(sys.stdin.buffer.read(size))
        try:
            for name in needs:
                importlib.import_module(name)
        except ImportError as error:
            _send(answers, error.name or str(error))
            continue
        _send(answers, None)
        _limit(seconds, memory)
        _send(answers, _answer(*call))


def _answer(function: Any, raw: bytes, arguments: tuple[Any, ...]) -> Any:
    try:
        return function(raw, *arguments)
    except MemoryError:
        return Unreadable("too_much_memory", bytes=len(raw))
    except Exception as error:  # noqa: BLE001  a parser of damaged bytes may raise anything
        return Unreadable("damaged", f"{type(error).__name__}: {error}"[:300], len(raw))


def _limit(seconds: float, memory: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limit = used + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == -1 else min(limit, hard), hard))
    except OSError:  # no /proc: only the time is limited
        pass
    # If the parent dies in the meantime, nothing else ends this process.
    spent = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    end = int(spent.ru_utime + spent.ru_stime + 2 * seconds + 5)
    resource.setrlimit(resource.RLIMIT_CPU, (end if hard == -1 else min(end, hard), hard))


def _send(answers: Any, value: Any) -> None:
    data = pickle.dumps(value)
    answers.write(struct.pack("<Q", len(data)) + data)
    answers.flush()


if __name__ == "__main__":
    main()
