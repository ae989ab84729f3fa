"""A run in MLflow, if MLFLOW_TRACKING_URI is set: curves, gate and reports.

The run is the one that the platform created and named in MLFLOW_RUN_ID, or else one of our own,
which a retry of the same pipeline run finds by its tag. No fault of MLflow ends the work: it prints
a warning and the tracking stops. A pipelines server may set MLflow's variables in pods whose image
has no mlflow.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nudge.components.common.core.environment import RUN_ID
from nudge.components.common.core.sanitize import masked
from nudge.components.common.core.say import say

MLFLOW_VARIABLE, RUN_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"
TRACKED = "mlflow.json"
"""The file in a training history with the id of the run that has its curves."""
RUN_TAG = "nudge.run_id"
SEND_EVERY_S = 5.0
BATCH = 500
"""Metrics per request; MLflow takes up to 1000."""
PASSED_TO_NODES = (
    MLFLOW_VARIABLE, "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_WORKSPACE",
    "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_INSECURE_TLS",
)  # fmt: skip
"""Variables for a job's pods: none is a secret, because a job's YAML is no place for one. Where a
token or a password is needed, the step that follows the job writes the curves when it ends."""
CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


class Tracking:
    """A run in MLflow, or none."""

    def __init__(self) -> None:
        self._client: Any = None
        self.run_id = ""
        """Of the run in MLflow; empty without one."""
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self._sent = time.monotonic()

    def start(self, name: str, settings: dict[str, Any] | None = None, run_id: str = "") -> None:
        """Resume or create the run if MLFLOW_TRACKING_URI is set; ``run_id`` is one that is known
        to have this work."""
        if not os.environ.get(MLFLOW_VARIABLE, "").strip():
            return
        # MLflow's own default is 7 retries per request, which takes minutes if nothing answers.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        with self._or_warn():
            import mlflow

            client = self._client = mlflow.MlflowClient()
            self.run_id = os.environ.get(RUN_VARIABLE, "").strip() or run_id or self._found()
            if not self.run_id:
                experiment = self._experiment()
                tags = {RUN_TAG: os.environ.get(RUN_ID, "")}
                self.run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
            client.update_run(self.run_id, status="RUNNING")
            self._parameters(settings or {})

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log figures of one step; they are sent every few seconds, and at the end."""
        self._waiting.append((step, values))
        if time.monotonic() - self._sent > SEND_EVERY_S:
            self._send()

    def curves(self, points: Iterable[tuple[int, dict[str, float]]]) -> None:
        """Log the figures of many steps, in as few requests as MLflow allows."""
        if self._client is None:
            return
        with self._or_warn():
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            metrics = [
                Metric(name, float(value), now, step)
                for step, values in points
                for name, value in values.items()
                if isinstance(value, int | float) and math.isfinite(value)
            ]
            for first in range(0, len(metrics), BATCH):
                self._client.log_batch(self.run_id, metrics=metrics[first : first + BATCH])

    def tags(self, values: dict[str, str]) -> None:
        """Set tags of the run."""
        for name, value in values.items():
            if self._client is not None:
                with self._or_warn():
                    self._client.set_tag(self.run_id, name, masked(value)[:5000])

    def file(self, path: Path, name: str) -> None:
        """Store a file of the work under a name, which has a suffix that browsers know."""
        if self._client is None:
            return
        with self._or_warn():
            text = path.read_text(encoding="utf-8")
            self._client.log_text(self.run_id, text, f"nudge/{name}")

    def end(self, status: str) -> None:
        """End the run as FINISHED or FAILED."""
        self._send()
        if self._client is not None:
            with self._or_warn():
                self._client.set_terminated(self.run_id, status)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._sent = time.monotonic()
        self.curves(waiting)

    def write(self, folder: Path) -> None:
        """Note in a training history which run has its curves."""
        if self._client is not None:
            (folder / TRACKED).write_text(json.dumps({"run_id": self.run_id}))

    def _found(self) -> str:
        """Our own run of an earlier attempt."""
        ours = os.environ.get(RUN_ID, "")
        if not ours:
            return ""
        quoted = ours.replace("'", "")
        runs = self._client.search_runs(
            [self._experiment()], filter_string=f"tags.`{RUN_TAG}` = '{quoted}'", max_results=1
        )
        return str(runs[0].info.run_id) if runs else ""

    def _experiment(self) -> str:
        import mlflow

        if found := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return found
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
        if not name:
            return "0"
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        with contextlib.suppress(mlflow.MlflowException):  # another process was first
            return str(self._client.create_experiment(name))
        return str(self._client.get_experiment_by_name(name).experiment_id)

    def _parameters(self, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        # MLflow refuses to change a parameter, such as one of an earlier attempt.
        fresh = [
            Param(key, masked(str(value))[:500])
            for key, value in settings.items()
            if key not in known
        ]
        self._client.log_batch(self.run_id, params=fresh)

    @contextlib.contextmanager
    def _or_warn(self) -> Iterator[None]:
        try:
            yield
        # MLflow's plugins and transports may raise anything; none of it should end the work.
        except Exception as error:  # noqa: BLE001
            self._client = None
            missing = isinstance(error, ModuleNotFoundError) and error.name == "mlflow"
            reason = "mlflow is not installed" if missing else f"{type(error).__name__}: {error}"
            warning = f"warning: {MLFLOW_VARIABLE} is set, but the run is not tracked: {reason}"
            advice = "; pip install 'nudge-lm[mlflow]', or unset it" if missing else ""
            say(f"{warning}{advice}")


def tracked_run(history: Path) -> str:
    """The id of the run in MLflow that has a training's curves; empty if none does."""
    try:
        return str(json.loads((history / TRACKED).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError):
        return ""


def track_history(history: Path, name: str, settings: dict[str, Any], report: Path) -> None:
    """Log the curves and the report of a training that ran elsewhere, unless it did so itself."""
    if tracked_run(history):
        return
    tracking = Tracking()
    tracking.start(name, settings)
    lines = (history / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line) for line in lines]
    tracking.curves(
        (each["step"], {key: value for key, value in each.items() if key != "step"})
        for each in values
    )
    tracking.file(report, "train.html")
    tracking.end("FINISHED")
    tracking.write(history)


def for_nodes() -> dict[str, str]:
    """The variables with which a job's pods track themselves; empty if they cannot."""
    if any(os.environ.get(name) for name in CREDENTIALS):
        return {}
    found = {name: os.environ[name] for name in PASSED_TO_NODES if os.environ.get(name)}
    if MLFLOW_VARIABLE not in found:
        return {}
    platform = os.environ.get(RUN_VARIABLE)
    return {**found, **({RUN_VARIABLE: platform} if platform else {})}
