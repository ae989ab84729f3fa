"""The output of every benchmark: a table on the terminal and ``.nudge/bench/<name>.json``.

The file contains the machine, the relevant versions, and a list of measures: ``measure, ours, peer,
peer_name, unit, ratio, goal, met, note``. A measure that could not be taken is not left out: it has
``ours: null`` and the reason in ``note``.
"""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nudge.components.common.core.publish import write_atomic
from nudge.components.common.local.processes import nudge_home


def processor() -> str:
    """The processor's name."""
    from nudge.kernels import machine

    return machine.processor()


def _machine() -> dict[str, str]:
    # It imports torch: 2 s in every process of a benchmark that needs no torch.
    from nudge.kernels import machine

    return machine.describe()


@dataclass(frozen=True)
class Measure:
    """One comparison; ``ratio`` is ours / peer, and ``goal`` is its upper or lower bound."""

    measure: str
    unit: str
    ours: float | None
    peer: float | None = None
    peer_name: str = ""
    goal: float | None = None
    better: Literal["lower", "higher"] = "lower"
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.ours is not None and self.peer else None

    @property
    def met(self) -> bool | None:
        """Whether the ratio (without a peer, the value) reaches the goal; None if unknown."""
        reached = self.ratio if self.peer_name else self.ours
        if self.goal is None or reached is None:
            return None
        return reached <= self.goal if self.better == "lower" else reached >= self.goal


def publish(name: str, measures: Sequence[Measure], packages: Iterable[str], device: str) -> None:
    """Print the table and write the file; ``device`` names the CPU or GPU that was measured."""
    values: dict[str, Any] = {
        "machine": {
            "device": device,
            **_machine(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "packages": {package: _version(package) for package in packages},
        },
        "measures": [{**asdict(m), "ratio": m.ratio, "met": m.met} for m in measures],
    }
    path = nudge_home() / "bench" / f"{name}.json"
    write_atomic(path, json.dumps(values, indent=2) + "\n")
    table = Table(title=f"{name} on {device}", caption=str(path))
    for column in ("measure", "unit", "ours", "peer", "", "ratio", "goal", "met"):
        table.add_column(column, justify="left" if column in ("measure", "unit", "") else "right")
    for m in measures:
        goal = "" if m.goal is None else f"{'<=' if m.better == 'lower' else '>='} {m.goal:g}"
        met = {True: "yes", False: "NO", None: ""}[m.met]
        what = f"{m.measure} ({m.note})" if m.note else m.measure
        figures = [_shown(m.ours), _shown(m.peer), m.peer_name, _shown(m.ratio)]
        table.add_row(escape(what), m.unit, *figures, goal, met)
    Console().print(table)
    for name, value in _machine().items():
        print(f"{name:<17} {value}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
