"""What a check is, and how it ends."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["passed", "failed", "skipped"]


class Skipped(Exception):
    """A check cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Here:
    """Where checks run: on a GPU or a CPU, with a folder for their files."""

    device: Literal["cuda", "cpu"]
    folder: Path

    @property
    def gpu(self) -> bool:
        """Whether the checks run on a GPU."""
        return self.device == "cuda"

    def needs_gpu(self) -> None:
        """Raise `Skipped` on a CPU."""
        if not self.gpu:
            raise Skipped("needs a GPU")


@dataclass(frozen=True)
class Check:
    """One check: ``run`` raises if it fails, and returns figures to show if it passes.

    ``limit_s`` is the number of seconds after which it counts as failed.
    """

    name: str
    title: str
    run: Callable[[Here], dict[str, Any]]
    limit_s: float = 90.0


@dataclass(frozen=True)
class Outcome:
    """How a check ended. ``message`` is empty if it passed; ``detail`` is the end of a traceback or
    of a log."""

    name: str
    title: str
    state: State
    message: str = ""
    detail: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
