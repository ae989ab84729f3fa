"""What work used: wall time, CPU time, GPU time and energy.

The step decorator measures each step (`measured`). A step whose work ran in other processes adds
what they measured themselves (`add`): ranks on GPUs, or a job on other nodes.
"""

import contextlib
import dataclasses
import resource
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any

from nudge.components.common.core.progress import last_events
from nudge.components.common.spending.energy import Energy, gpus_in_use


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What some work used; the sum of two is the usage of both."""

    seconds: float = 0.0
    """Wall time."""
    core_seconds: float = 0.0
    """CPU time of the processes, over all cores."""
    gpu_seconds: float = 0.0
    """Wall time for which GPUs were in use, times their number."""
    node_seconds: float = 0.0
    """Wall time times the number of nodes."""
    joules: float | None = None
    """Energy; None if no device reports it."""

    def __add__(self, other: "Usage") -> "Usage":
        known = [each.joules for each in (self, other) if each.joules is not None]
        return Usage(
            seconds=self.seconds + other.seconds,
            core_seconds=self.core_seconds + other.core_seconds,
            gpu_seconds=self.gpu_seconds + other.gpu_seconds,
            node_seconds=self.node_seconds + other.node_seconds,
            joules=sum(known) if known else None,
        )

    def times(self, factor: float) -> "Usage":
        """This usage in proportion."""
        return Usage(
            seconds=self.seconds * factor,
            core_seconds=self.core_seconds * factor,
            gpu_seconds=self.gpu_seconds * factor,
            node_seconds=self.node_seconds * factor,
            joules=None if self.joules is None else self.joules * factor,
        )

    def since(self, earlier: "Usage") -> "Usage":
        """What was used after an earlier reading of the same work."""
        back = earlier.times(-1.0)
        return self + (replace(back, joules=None) if self.joules is None else back)

    @property
    def core_hours(self) -> float:
        return self.core_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.gpu_seconds / 3600

    @property
    def kwh(self) -> float | None:
        """Energy in kilowatt-hours; None if no device reports it."""
        return None if self.joules is None else self.joules / 3.6e6

    def amounts(self) -> dict[str, float]:
        """What prices apply to, by the names of `Prices.cost`."""
        return {
            "gpu_hours": self.gpu_hours,
            "core_hours": self.core_hours,
            "node_hours": self.node_seconds / 3600,
            "kwh": self.kwh or 0.0,
        }


NOTHING = Usage()


def usage_of(values: Any) -> Usage | None:
    """A usage from plain values, such as an event's; None if they are not one."""
    if not isinstance(values, dict):
        return None
    known = {field.name for field in fields(Usage)}
    numbers = {
        name: float(value)
        for name, value in values.items()
        if name in known and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Usage(**numbers) if numbers else None


def plain_usage(usage: Usage) -> dict[str, float]:
    """A usage as plain values, rounded to milliseconds and millijoules; `usage_of` reads them."""
    values = dataclasses.asdict(usage)
    return {name: round(value, 3) for name, value in values.items() if value is not None}


def of_earlier_steps(*, reused: bool) -> dict[str, Usage]:
    """What each finished step of this local run used; empty where events are not kept.

    With ``reused``, a reused step counts with what it used when it ran; else with what this run
    spent on it.
    """
    found = {}
    for step, event in last_events().items():
        made_with = usage_of(event.get("made_with")) if reused else None
        if used := made_with or usage_of(event.get("usage")):
            found[step] = used
    return found


class Meter:
    """Measures this process and the child processes that it waited for, from its creation on."""

    def __init__(self) -> None:
        self._started, self._cpu = time.monotonic(), cpu_seconds()
        self.energy = Energy()
        self.added = NOTHING
        """What other processes used."""

    def add(self, usage: Usage) -> None:
        """Count what other processes used in addition."""
        self.added += usage

    def read(self) -> Usage:
        """The usage so far."""
        seconds = time.monotonic() - self._started
        gpus = len(gpus_in_use())
        # A pod holds its GPUs from its start, not from the first kernel.
        own = Usage(
            seconds=seconds,
            core_seconds=cpu_seconds() - self._cpu,
            gpu_seconds=seconds * gpus,
            node_seconds=seconds,
            joules=self.energy.joules(),
        )
        return own + self.added


def cpu_seconds() -> float:
    """CPU time so far of this process and of the children that it waited for, in seconds."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextlib.contextmanager
def measured() -> Iterator[Meter]:
    """Measure the block; `add` and `so_far` refer to this measurement within it."""
    meter, around = Meter(), _meter.get()
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)
        meter.energy.close()
        if around is not None:
            around.add(meter.added)


def add(usage: Usage) -> None:
    """Add what other processes used to the measurement around this call, if there is one."""
    if meter := _meter.get():
        meter.add(usage)


def so_far() -> Usage:
    """What the work around this call has used; nothing outside of `measured`."""
    meter = _meter.get()
    return meter.read() if meter else NOTHING
