"""A pool of processes for work that takes a core each."""

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def spawned(count: int, begin: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool whose processes call ``begin`` first; not forked, which hangs where threads run.

    All of them start now: CPython 3.11 starts one whenever none is idle, and waits without an end
    for one that it was starting while another was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=begin, initargs=arguments)
    with contextlib.suppress(BrokenProcessPool):  # told to who hands it work
        for _ in range(count):
            pool.submit(_nothing)
    return pool


def _nothing() -> None:
    pass
