"""A pool of processes, each of which uses one core."""

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def spawned(count: int, begin: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """A pool whose processes first call ``begin``. They are spawned: forks hang if threads run.

    All of them start immediately. Otherwise CPython 3.11 starts one whenever none is idle, and
    waits forever for a process that it is starting while another is killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=begin, initargs=arguments)
    with contextlib.suppress(BrokenProcessPool):  # the caller gets it when it submits work
        for _ in range(count):
            pool.submit(_nothing)
    return pool


def _nothing() -> None:
    pass
