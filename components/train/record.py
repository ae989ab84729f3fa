"""What is written down while training goes on: lines of JSON and TensorBoard files; MLflow too
where MLFLOW_TRACKING_URI is set, and the state of a TrainJob in one."""

import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nudge.components.common.errors import UserError
from nudge.components.train.job_status import JobStatus, open_job_status

METRICS, PROBES = "metrics.jsonl", "probes.jsonl"
MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"


class Record:
    """The open files of a history; made by `open_record`.

    ``metric`` and ``probe`` take a line each. A resumed run gives the lines of the one before to
    ``replay``, so that a history is whole whatever happened on the way.
    """

    def __init__(self, folder: Path, board: Any, mlflow: Any, status: JobStatus) -> None:
        self.lines: dict[str, list[str]] = {METRICS: [], PROBES: []}
        self._files: dict[str, IO[str]] = {
            name: (folder / name).open("w", encoding="utf-8", buffering=1) for name in self.lines
        }
        self._board, self._mlflow, self._status = board, mlflow, status

    def metric(self, values: dict[str, Any]) -> None:
        """Keep the figures of one step; ``None`` is a figure that is not known."""
        self._write(METRICS, json.dumps(values))
        self._draw(values)
        self._status.metric(values)

    def probe(self, values: dict[str, Any]) -> None:
        """Keep what the model expects after the watched prompt."""
        self._write(PROBES, json.dumps(values))
        self._draw({"step": values["step"], "watched_p": values["p"]})

    def replay(self, lines: dict[str, list[str]]) -> None:
        """Write down again what an earlier part of this run wrote."""
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

    def _draw(self, values: dict[str, Any]) -> None:
        shown = {
            name: float(value)
            for name, value in values.items()
            if name != "step" and value is not None and math.isfinite(value)
        }
        for name, value in shown.items():
            self._board.add_scalar(f"train/{name}", value, values["step"])
        if self._mlflow is not None:
            self._mlflow.log_metrics(shown, step=values["step"], synchronous=False)


class NoRecord:
    """The same for ranks that write nothing."""

    lines: dict[str, list[str]] = {METRICS: [], PROBES: []}  # noqa: RUF012

    def metric(self, values: dict[str, Any]) -> None:
        pass

    def probe(self, values: dict[str, Any]) -> None:
        pass

    def replay(self, lines: dict[str, list[str]]) -> None:
        pass


class NoBar:
    """A progress bar for ranks that show nothing."""

    def advance(self, amount: float = 1, **fields: Any) -> None:
        pass

    def note(self, **fields: Any) -> None:
        pass


def check_mlflow() -> None:
    """Raise `UserError` if MLflow is asked for and not installed; it is not imported."""
    if os.environ.get(MLFLOW_VARIABLE) and importlib.util.find_spec("mlflow") is None:
        raise UserError(
            f"{MLFLOW_VARIABLE} is set and mlflow is not installed; "
            "pip install 'nudge-lm[mlflow]', or unset it"
        )


@contextlib.contextmanager
def open_record(folder: Path, name: str, settings: dict[str, Any], steps: int) -> Iterator[Record]:
    """Write the history of a run of ``steps`` steps into ``folder`` while the block runs.

    Raises `UserError` if MLflow is asked for and is not installed or does not answer.
    """
    from tensorboardX import SummaryWriter

    with _mlflow_run(name, settings) as mlflow, open_job_status(steps) as status:
        board = SummaryWriter(str(folder / "tensorboard"), write_to_disk=True)
        record = Record(folder, board, mlflow, status)
        try:
            yield record
        finally:
            record.close()


@contextlib.contextmanager
def _mlflow_run(name: str, settings: dict[str, Any]) -> Iterator[Any]:
    if not os.environ.get(MLFLOW_VARIABLE):
        yield None
        return
    check_mlflow()
    import mlflow

    try:
        run = mlflow.start_run(run_name=name)
        mlflow.log_params({key: str(value)[:500] for key, value in settings.items()})
    except mlflow.exceptions.MlflowException as error:
        raise UserError(f"{MLFLOW_VARIABLE}: MLflow does not take the run: {error}") from None
    with run:
        yield mlflow
