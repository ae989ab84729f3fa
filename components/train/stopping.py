"""SIGTERM while training: noted, so that a checkpoint can be written before the end."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from nudge.components.train.ranks import Ranks


class Stopping:
    """While open, SIGTERM sets ``asked`` instead of ending the process, if ``wanted``.

    A pod that is evicted or cancelled has its grace period, often 30 s, from then on.
    """

    def __init__(self, wanted: bool) -> None:
        self.asked = False
        self._wanted = wanted and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Self:
        if self._wanted:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            signal.signal(signal.SIGTERM, self._before)

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; the same answer on all."""
        return ranks.sum(float(self.asked))[0] > 0

    def _note(self, _: int, __: FrameType | None) -> None:
        self.asked = True
