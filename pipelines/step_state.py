"""What is known about a step while a run is followed, here or on a cluster."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class StepState:
    """What is known about a step so far."""

    name: str
    status: str = "waiting"
    seconds: float = 0.0
    started: float = 0.0
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    usage: dict[str, float] = field(default_factory=dict)
    """What this run spent on it (a plain `Usage`)."""
    attempts: int = 1
    note: str = ""
    """Why it waits, or how its last attempt was killed, where that is known."""

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event of `nudge.components.common.core.progress`."""
        kind = event["event"]
        if kind == "step_start":
            self.status, self.started = "running", event["time"]
        elif kind in ("start", "progress"):
            self.done, self.total, self.unit = event["done"], event["total"], event["unit"]
            self.fields = event["fields"]
        elif kind == "step_end":
            self.status, self.seconds = event["status"], event["seconds"]
            self.outputs, self.results = event["outputs"], event["results"]
            self.usage = event.get("usage") or {}
        elif kind == "step_failed":
            self.status, self.error = "failed", event["error"]
            self.seconds = max(event["time"] - self.started, 0.0)  # the clock may have been set
            self.usage = event.get("usage") or {}
