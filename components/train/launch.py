"""Train as a job of the cluster: create or adopt it, follow it, bring its model back.

The job's name comes from the run's id, so a step that is tried again finds the job that it had
begun and goes on following it. It belongs to the step's pod (ownerReference), is deleted when the
step is cancelled, and has a deadline of its own: nothing is left to hold a GPU for nobody.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from nudge.components.common.errors import UserError
from nudge.components.common.images import TRAIN_IMAGE
from nudge.components.common.kube import POD, Cluster, Conflict, condition, connect, describe
from nudge.components.common.pods import LogTail, why
from nudge.components.common.progress import Progress, progress
from nudge.components.common.provenance import this_run
from nudge.components.train.exchange import Exchange
from nudge.components.train.settings import TrainSettings
from nudge.components.train.trainjob import (
    CONTAINER,
    POD_LABEL,
    RUN_LABEL,
    TRAIN_JOB,
    job_name,
    train_job,
)
from nudge.components.train.worker import OUTPUTS

SHOWN = re.compile(r"train: (\d+)/(\d+) steps ?(.*)")
"""A line of progress in a pod's log."""

FIRST_NODE = {"batch.kubernetes.io/job-completion-index": "0"}
POLL_S = 5.0


def launch(settings: TrainSettings, paths: dict[str, Path]) -> None:
    """Train as a TrainJob; ``paths`` are the tokens and the outputs on this machine.

    Raises `UserError` with the cause (conditions, events, the end of the log) if the job fails, is
    deleted by somebody, is never admitted by its queue, or is not done by its deadline.
    """
    run_id = this_run("")
    if not run_id:
        raise UserError("launcher: trainjob needs a run's id in NUDGE_RUN_ID, to name its job by")
    name, cluster = job_name(run_id), connect(settings.cluster.namespace)
    exchange = Exchange(f"{_root(settings)}/{name}")
    schema = cluster.schema(TRAIN_JOB)
    if schema is None:
        raise UserError(f"this cluster has no TrainJob; it comes with {TRAIN_JOB.needs}")
    with progress("train", unit="steps") as bar, _cancelled() as stop:
        bar.note(stage="handing over the tokens")
        _send(exchange, settings, paths["tokens"])
        body = train_job(
            settings.cluster, name=name, exchange=exchange.uri,
            image=settings.cluster.image or TRAIN_IMAGE, schema=schema, owner=_this_pod(),
        )  # fmt: skip
        job = _created(cluster, body)
        try:
            _follow(cluster, job, settings, bar)
        except (_Late, stop):
            cluster.delete(TRAIN_JOB, name, uid=job["metadata"]["uid"])
            raise
        bar.note(stage="bringing the model back")
        for output in OUTPUTS:
            exchange.fetch(output, paths[output])
        cluster.delete(TRAIN_JOB, name, uid=job["metadata"]["uid"])


class _Late(UserError):
    """The job is not done by its deadline, or was never admitted."""


class Cancelled(SystemExit):
    """The step was told to end (SIGTERM)."""


@contextlib.contextmanager
def _cancelled() -> Iterator[type[BaseException]]:
    """Let SIGTERM raise the exception that this yields."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Cancelled(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield Cancelled
    finally:
        signal.signal(signal.SIGTERM, before)


def _root(settings: TrainSettings) -> str:
    if settings.cluster.exchange:
        return settings.cluster.exchange.rstrip("/")
    bucket = os.environ.get("AWS_S3_BUCKET")
    if not bucket:
        raise UserError(
            "train.cluster.exchange is empty and AWS_S3_BUCKET is not set; give an s3:// URI or a "
            "folder of a shared volume that the job's pods reach too"
        )
    return f"s3://{bucket}/nudge/jobs"


def _send(exchange: Exchange, settings: TrainSettings, tokens: Path) -> None:
    """The inputs of the job: what the ranks run is the same recipe, launched locally."""
    there = dataclasses.replace(
        settings,
        launcher="local",
        checkpoints=settings.checkpoints or f"{exchange.uri}/checkpoints",
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.json"
        recipe.write_text(json.dumps({"train": dataclasses.asdict(there)}), encoding="utf-8")
        exchange.send("recipe", recipe)
    exchange.send("tokens", tokens)


def _this_pod() -> dict[str, Any] | None:
    """A reference to the pod of this step, as the pipeline engine tells it; None outside of one."""
    name, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
    if not (name and uid):
        return None
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}


def _created(cluster: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    """The job: the one that this run began before, or a new one (also where that one failed)."""
    name = body["metadata"]["name"]
    there = cluster.get(TRAIN_JOB, name)
    if there is not None and _is(there, "Failed"):
        cluster.delete(TRAIN_JOB, name, uid=there["metadata"]["uid"])
        cluster.poll(TRAIN_JOB, name, lambda job: job is None or None, timeout_s=120)
        there = None
    if there is None:
        try:
            return cluster.create(TRAIN_JOB, body)
        except Conflict:  # made by a request whose answer was lost, or by a step beside this one
            there = cluster.get(TRAIN_JOB, name)
    ours = there is not None and there["metadata"].get("labels", {}).get(RUN_LABEL) == name
    if (
        there is None
        or not ours
        or there["spec"]["trainer"]["args"] != body["spec"]["trainer"]["args"]
    ):
        raise UserError(
            f"the TrainJob {name} in namespace {cluster.namespace} is not of this run; delete it, "
            "or start the run again under another id"
        )
    return there


def _follow(cluster: Cluster, job: dict[str, Any], settings: TrainSettings, bar: Progress) -> None:
    """Show the job's log and progress until it is complete."""
    name = job["metadata"]["name"]
    tail: list[LogTail] = []

    def judge(found: dict[str, Any] | None) -> bool | None:
        if found is None or found["metadata"]["uid"] != job["metadata"]["uid"]:
            raise UserError(f"the TrainJob {name} was deleted before it was complete")
        if _is(found, "Suspended"):
            queue = settings.cluster.queue
            bar.note(stage=f"waiting in the queue {queue}" if queue else "suspended")
        else:
            _show(cluster, name, tail, bar)
        if _is(found, "Failed"):
            cause = why(cluster, {POD_LABEL: name}, found)
            raise UserError(f"the TrainJob {name} failed: {describe(found)}\n{cause}".rstrip())
        return True if _is(found, "Complete") else None

    def late() -> str:
        found = cluster.get(TRAIN_JOB, name)
        waits = f"queue {settings.cluster.queue or '(none)'} never admitted it: "
        cause = why(cluster, {POD_LABEL: name}, found)
        told = waits if found and _is(found, "Suspended") else ""
        return f"{told}{describe(found)}\n{cause}".rstrip()

    try:
        cluster.poll(
            TRAIN_JOB, name, judge,
            timeout_s=settings.cluster.deadline_hours * 3600, interval_s=POLL_S, late=late,
        )  # fmt: skip
    except UserError as error:
        if "is not ready after" in str(error):
            raise _Late(f"{error}; raise train.cluster.deadline_hours if it needs longer") from None
        raise


def _show(cluster: Cluster, name: str, tail: list[LogTail], bar: Progress) -> None:
    """New lines of the first node's log, and the progress that they tell."""
    if not tail:
        pods = cluster.list(POD, {POD_LABEL: name, **FIRST_NODE})
        if not pods:
            bar.note(stage="waiting for the pods")
            return
        tail.append(LogTail(cluster, pods[-1]["metadata"]["name"], CONTAINER))
        bar.note(stage="training")
    for line in tail[0].lines():
        if match := SHOWN.fullmatch(line.strip()):
            bar.total = float(match[2])
            bar.advance(float(match[1]) - bar.done, job=match[3])
        else:
            print(f"{name}: {line}", file=sys.stderr, flush=True)


def _is(job: dict[str, Any], type: str) -> bool:
    return (condition(job, type) or {}).get("status") == "True"
