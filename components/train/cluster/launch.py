"""Train as a job of the cluster: create or adopt it, follow it, bring its model back.

The job's name comes from the run's id, so a step that is tried again finds the job that it had
begun and goes on following it. It belongs to the step's pod (ownerReference), is deleted when the
step is cancelled, and has a deadline of its own: nothing is left to hold a GPU for nobody.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from nudge.components.common.clients.kube import POD, Cluster, NotInTime, ResourceConflict, connect
from nudge.components.common.clients.pods import LogTail, why
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.images import TRAIN_IMAGE
from nudge.components.common.core.progress import SHOWN, Progress, progress
from nudge.components.common.core.provenance import this_run
from nudge.components.common.models.base_model import resolved
from nudge.components.train.cluster import rayjob, trainjob
from nudge.components.train.cluster.handover import Exchange
from nudge.components.train.cluster.jobs import (
    PASSED_ON,
    RUN_LABEL,
    Engine,
    Step,
    job_name,
    seconds_left,
)
from nudge.components.train.cluster.worker import OUTPUTS
from nudge.components.train.settings import TrainSettings

ENGINES: dict[str, Engine] = {"trainjob": trainjob, "rayjob": rayjob}
STEP_CONTAINER = "main"
BUNDLE_VOLUME = "custom-ca"
"""What Kubeflow Pipelines calls the container of a step, and the volume of certificate authorities
that its server gives it (backend/src/v2/compiler/argocompiler/common.go). On OpenShift AI the
system's own are in that bundle."""
POLL_S = 5.0
LONGER = "raise train.cluster.deadline_hours if it needs longer"


def launch(settings: TrainSettings, paths: dict[str, Path]) -> None:
    """Train as a job of the cluster; ``paths`` are the tokens and the outputs on this machine.

    Raises `UserError` with the cause (conditions, events, the end of the log) if the job fails, is
    deleted by somebody, is never admitted by its queue, or is not done by its deadline.
    """
    engine, run_id = ENGINES[settings.launcher], this_run("")
    if not run_id:
        raise UserError(
            f"launcher: {settings.launcher} needs a run's id in NUDGE_RUN_ID, to name its job by"
        )
    kind, name, cluster = engine.KIND, job_name(run_id), connect(settings.cluster.namespace)
    exchange = Exchange(f"{_root(settings)}/{name}")
    schema = cluster.schema(engine.KIND)
    if schema is None:
        raise UserError(
            f"this cluster has no {engine.KIND.name}; it comes with {engine.KIND.needs}"
        )
    with progress("train", unit="steps") as bar, _cancelled() as stop:
        bar.note(stage="handing over the tokens")
        _send(exchange, settings, paths["tokens"])
        body = engine.body(
            settings.cluster, name=name, exchange=exchange.uri,
            schema=schema, step=_this_step(cluster, settings.cluster.image),
        )  # fmt: skip
        job = _created(cluster, engine, body)
        try:
            _follow(cluster, engine, job, settings, bar)
        except (_Late, stop):
            cluster.delete(kind, name, uid=job["metadata"]["uid"])
            raise
        bar.note(stage="bringing the model back")
        for output in OUTPUTS:
            exchange.fetch(output, paths[output])
        cluster.delete(kind, name, uid=job["metadata"]["uid"])
        try:
            exchange.clear()
        except UserError as error:  # the model is here; what is left there costs space only
            print(f"warning: {error}", file=sys.stderr, flush=True)


class _Late(Transient):
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
    from nudge.components.common.clients.storage import bucket_name

    bucket = bucket_name()
    if not bucket:
        raise UserError(
            "train.cluster.exchange is empty and AWS_S3_BUCKET is not set; give an s3:// URI or a "
            "folder of a shared volume that the job's pods reach too"
        )
    return f"s3://{bucket}/nudge/jobs"


def _send(exchange: Exchange, settings: TrainSettings, tokens: Path) -> None:
    """The inputs of the job: what the ranks run is the same recipe, launched locally, from the
    model that is served as the step sees it (the nodes' account may not ask the registry)."""
    there = dataclasses.replace(
        settings,
        launcher="local",
        base_model=resolved(settings.base_model),
        checkpoints=settings.checkpoints or f"{exchange.uri}/checkpoints",
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.json"
        recipe.write_text(json.dumps({"train": dataclasses.asdict(there)}), encoding="utf-8")
        exchange.send("recipe", recipe)
    exchange.send("tokens", tokens)


def _this_step(cluster: Cluster, image: str) -> Step:
    """What the job takes over from this step's pod, which the pipeline engine names; outside of one
    nothing. ``image`` stands above the pod's."""
    name, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
    if not (name and uid):
        return Step(image or TRAIN_IMAGE)
    spec: dict[str, Any] = {}
    for pod in cluster.list(POD, metadata__name=name):
        spec = pod["spec"]
    images = {each["name"]: str(each["image"]) for each in spec.get("containers", [])}
    volumes = {each["name"]: each for each in spec.get("volumes", [])}
    bundle = volumes.get(BUNDLE_VOLUME, {})
    return Step(
        image=image or images.get(STEP_CONTAINER, TRAIN_IMAGE),
        owner={"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid},
        variables={each: os.environ[each] for each in PASSED_ON if each in os.environ},
        trusted={key: value for key, value in bundle.items() if key != "name"} or None,
    )


def _created(cluster: Cluster, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
    """The job: the one that this run began before, or a new one (also where that one failed)."""
    kind, name = engine.KIND, body["metadata"]["name"]
    there = cluster.get(kind, name)
    if there is not None and engine.stage(there) == "failed":
        cluster.delete(kind, name, uid=there["metadata"]["uid"])
        cluster.poll(kind, name, lambda job: job is None or None, timeout_s=120)
        there = None
    if there is None:
        try:
            return cluster.create(kind, body)
        except (
            ResourceConflict
        ):  # made by a request whose answer was lost, or by a step beside this one
            there = cluster.get(kind, name)
    ours = there is not None and there["metadata"].get("labels", {}).get(RUN_LABEL) == name
    if there is None or not ours or engine.started_with(there) != engine.started_with(body):
        raise UserError(
            f"the {kind.name} {name} in namespace {cluster.namespace} is not of this run; delete "
            "it, or start the run again under another id"
        )
    return there


def _follow(
    cluster: Cluster, engine: Engine, job: dict[str, Any], settings: TrainSettings, bar: Progress
) -> None:
    """Show the job's log and progress until it is complete."""
    kind, name = engine.KIND, job["metadata"]["name"]
    tail: list[LogTail] = []

    def judge(found: dict[str, Any] | None) -> bool | None:
        if found is None or found["metadata"]["uid"] != job["metadata"]["uid"]:
            raise Transient(f"the {kind.name} {name} was deleted before it was complete")
        stage = engine.stage(found)
        if stage == "suspended":
            queue = settings.cluster.queue
            bar.note(stage=f"waiting in the queue {queue}" if queue else "suspended")
            tail.clear()  # what is admitted again has other pods
        else:
            _show(cluster, engine, name, tail, bar)
        if stage == "failed":
            told, cause = engine.describe_status(found), why(cluster, engine.pods(name), found)
            longer = f"; {LONGER}" if "DeadlineExceeded" in told else ""
            raise Transient(f"the {kind.name} {name} failed: {told}{longer}\n{cause}".rstrip())
        return True if stage == "complete" else None

    def late() -> str:
        found = cluster.get(kind, name)
        if found is None:
            return "it is not there"
        waits = f"queue {settings.cluster.queue or '(none)'} never admitted it: "
        queued = waits if engine.stage(found) == "suspended" else ""
        status = engine.describe_status(found)
        return f"{queued}{status}\n{why(cluster, engine.pods(name), found)}".rstrip()

    left = seconds_left(job, settings.cluster)
    try:
        cluster.poll(kind, name, judge, timeout_s=left, interval_s=POLL_S, late=late)
    except NotInTime as error:
        hours = f"{settings.cluster.deadline_hours:g} h after its creation"
        raise _Late(f"the {kind.name} {name} is not done {hours}: {error.why}\n{LONGER}") from None


def _show(cluster: Cluster, engine: Engine, name: str, tail: list[LogTail], bar: Progress) -> None:
    """New lines of the log, and the progress that they tell."""
    labels, container = engine.LOG
    if not tail:
        pods = cluster.list(POD, {**engine.pods(name), **labels})
        if not pods:
            bar.note(stage="waiting for the pods")
            return
        tail.append(LogTail(cluster, pods[-1]["metadata"]["name"], container))
        bar.note(stage="training")
    for line in map(engine.plain, tail[0].lines()):
        match = SHOWN.fullmatch(line.strip())
        if match and match[1] == "train" and match[3]:
            bar.total = float(match[3])
            bar.advance(float(match[2]) - bar.done, job=match[5])
        else:
            print(f"{name}: {line}", file=sys.stderr, flush=True)
