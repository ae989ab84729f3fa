"""Handles SIGTERM during training, so that a checkpoint can be written before the process ends."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from nudge.components.train.ranks import Ranks


class Stopping:
    """While open and ``enabled``, SIGTERM sets ``requested`` instead of ending the process.

    An evicted or canceled pod then has its grace period, often 30 s, to finish.
    """

    def __init__(self, enabled: bool) -> None:
        self.requested = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous: Any = None

    def __enter__(self) -> Self:
        if self._enabled:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGTERM, self._previous)

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank got SIGTERM; the answer is the same on all ranks."""
        return ranks.sum(float(self.requested))[0] > 0

    def _handle(self, _: int, __: FrameType | None) -> None:
        self.requested = True
