"""The training log: JSON lines and TensorBoard files; MLflow too if MLFLOW_TRACKING_URI is set, and
the job's status if this is a TrainJob."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nudge.components.common.core.sanitize import masked
from nudge.components.common.core.say import say
from nudge.components.train.cluster.job_status import JobStatus, open_job_status

METRICS, PROBES = "metrics.jsonl", "probes.jsonl"
MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"


class TrainingLog:
    """The open files of a history; created by `open_record`.

    ``metric`` and ``probe`` each write one line. A resumed run passes the earlier lines to
    ``replay``, so that its history is complete.
    """

    def __init__(self, folder: Path, board: Any, tracking: "Tracking", status: JobStatus) -> None:
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


class NoBar:
    """A progress bar for ranks that display nothing."""

    def advance(self, amount: float = 1, **fields: Any) -> None:
        pass

    def note(self, **fields: Any) -> None:
        pass


class Tracking:
    """A run in MLflow, or none.

    If MLflow fails, it prints a warning and stops tracking, but training continues: a pipelines
    server may set MLflow's variables in pods whose image has no mlflow.
    """

    def __init__(self) -> None:
        self._mlflow: Any = None

    def start(self, name: str, settings: dict[str, Any]) -> None:
        """Start the run if MLFLOW_TRACKING_URI is set."""
        if not os.environ.get(MLFLOW_VARIABLE, "").strip():
            return
        # MLflow's own default is 7 retries per request, which takes minutes if nothing answers.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        with self._or_warn():
            import mlflow

            self._mlflow = mlflow
            mlflow.start_run(run_name=name)
            mlflow.log_params({key: masked(str(value))[:500] for key, value in settings.items()})

    def metrics(self, values: dict[str, float], step: int) -> None:
        if self._mlflow is not None:
            with self._or_warn():
                self._mlflow.log_metrics(values, step=step, synchronous=False)

    def end(self, status: str) -> None:
        """End the run as FINISHED or FAILED."""
        if self._mlflow is not None:
            with self._or_warn():
                self._mlflow.end_run(status)

    @contextlib.contextmanager
    def _or_warn(self) -> Iterator[None]:
        try:
            yield
        # MLflow's plugins and transports may raise anything; none of it should end the training.
        except Exception as error:  # noqa: BLE001
            self._mlflow = None
            missing = isinstance(error, ModuleNotFoundError) and error.name == "mlflow"
            reason = "mlflow is not installed" if missing else f"{type(error).__name__}: {error}"
            warning = f"warning: {MLFLOW_VARIABLE} is set, but the run is not tracked: {reason}"
            advice = "; pip install 'nudge-lm[mlflow]', or unset it" if missing else ""
            say(f"{warning}{advice}")


@contextlib.contextmanager
def open_record(
    folder: Path, name: str, settings: dict[str, Any], steps: int
) -> Iterator[TrainingLog]:
    """Write the history of a run of ``steps`` steps into ``folder`` while the block runs, and to
    MLflow if it is configured and works."""
    from tensorboardX import SummaryWriter

    with _tracked(name, settings) as tracking, open_job_status(steps) as status:
        board = SummaryWriter(str(folder / "tensorboard"), write_to_disk=True)
        record = TrainingLog(folder, board, tracking, status)
        try:
            yield record
        finally:
            record.close()


@contextlib.contextmanager
def _tracked(name: str, settings: dict[str, Any]) -> Iterator[Tracking]:
    tracking = Tracking()
    tracking.start(name, settings)
    try:
        yield tracking
    except BaseException:
        tracking.end("FAILED")
        raise
    tracking.end("FINISHED")
