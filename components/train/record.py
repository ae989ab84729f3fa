"""The training log: JSON lines and TensorBoard files; MLflow too if MLFLOW_TRACKING_URI is set, and
the job's status if this is a TrainJob."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nudge.components.common.clients.tracking import Tracking
from nudge.components.train.cluster.job_status import JobStatus, open_job_status

METRICS, PROBES = "metrics.jsonl", "probes.jsonl"


class TrainingLog:
    """The open files of a history; created by `open_record`.

    ``metric`` and ``probe`` each write one line. A resumed run passes the earlier lines to
    ``replay``, so that its history is complete.
    """

    def __init__(self, folder: Path, board: Any, tracking: Tracking, status: JobStatus) -> None:
        self.lines: dict[str, list[str]] = {METRICS: [], PROBES: []}
        self._files: dict[str, IO[str]] = {
            name: (folder / name).open("w", encoding="utf-8", buffering=1) for name in self.lines
        }
        self._board, self._tracking, self._status = board, tracking, status

    def metric(self, values: dict[str, Any]) -> None:
        """Log the figures of one step; ``None`` marks an unknown figure."""
        self._write(METRICS, json.dumps(values))
        self._plot(values)
        self._status.metric(values)

    def probe(self, values: dict[str, Any]) -> None:
        """Log what the model predicts after the watched prompt."""
        self._write(PROBES, json.dumps(values))
        self._plot({"step": values["step"], "watched_p": values["p"]})

    def replay(self, lines: dict[str, list[str]]) -> None:
        """Write the lines of an earlier part of this run."""
        for line in lines[METRICS]:
            self.metric(json.loads(line))
        for line in lines[PROBES]:
            self.probe(json.loads(line))

    def report(self, path: Path) -> None:
        """Store the training's page in MLflow."""
        self._tracking.file(path, "train.html")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._board.close()

    def _write(self, name: str, line: str) -> None:
        self.lines[name].append(line)
        print(line, file=self._files[name])

    def _plot(self, values: dict[str, Any]) -> None:
        finite = {
            name: float(value)
            for name, value in values.items()
            if name != "step" and value is not None and math.isfinite(value)
        }
        for name, value in finite.items():
            self._board.add_scalar(f"train/{name}", value, values["step"])
        self._tracking.metrics(finite, values["step"])


class NoTrainingLog:
    """A `TrainingLog` for ranks that write nothing."""

    lines: dict[str, list[str]] = {METRICS: [], PROBES: []}  # noqa: RUF012

    def metric(self, values: dict[str, Any]) -> None:
        pass

    def probe(self, values: dict[str, Any]) -> None:
        pass

    def replay(self, lines: dict[str, list[str]]) -> None:
        pass

    def report(self, path: Path) -> None:
        pass


class NoBar:
    """A progress bar for ranks that display nothing."""

    def advance(self, amount: float = 1, **fields: Any) -> None:
        pass

    def note(self, **fields: Any) -> None:
        pass


@contextlib.contextmanager
def open_record(
    folder: Path, name: str, settings: dict[str, Any], steps: int
) -> Iterator[TrainingLog]:
    """Write the history of a run of ``steps`` steps into ``folder`` while the block runs, and to
    MLflow if it is configured and works."""
    from tensorboardX import SummaryWriter

    with _tracked(name, settings, folder) as tracking, open_job_status(steps) as status:
        board = SummaryWriter(str(folder / "tensorboard"), write_to_disk=True)
        record = TrainingLog(folder, board, tracking, status)
        try:
            yield record
        finally:
            record.close()


@contextlib.contextmanager
def _tracked(name: str, settings: dict[str, Any], folder: Path) -> Iterator[Tracking]:
    tracking = Tracking()
    tracking.start(name, settings)
    try:
        yield tracking
        tracking.write(folder)
    except BaseException:
        tracking.end("FAILED")
        raise
    tracking.end("FINISHED")
