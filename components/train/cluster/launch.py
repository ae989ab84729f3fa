"""Train as a job of the cluster: create or adopt it, follow it, download its model.

The job's name comes from the run's id, so a retry of the step finds the job of the earlier attempt
and follows that. The job belongs to the step's pod (ownerReference), is deleted when the step is
cancelled, and has a deadline of its own, so that no abandoned job keeps a GPU.
"""

import contextlib
import dataclasses
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from nudge.components.common.clients.kube import (
    POD,
    Cluster,
    NoSuchKind,
    ResourceConflict,
    ResourceKind,
    connect,
)
from nudge.components.common.clients.tracking import for_nodes
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.images import TRAIN_IMAGE
from nudge.components.common.core.progress import progress
from nudge.components.common.core.provenance import this_run
from nudge.components.common.core.say import say
from nudge.components.common.models.base_model import resolved
from nudge.components.common.spending.budget import OverBudget
from nudge.components.train.cluster import rayjob, trainjob
from nudge.components.train.cluster.following import Follower, Late
from nudge.components.train.cluster.handover import CHECKPOINTS, Handover, idle_folders
from nudge.components.train.cluster.jobs import (
    PASSED_ON,
    RUN_LABEL,
    Engine,
    Step,
    job_name,
)
from nudge.components.train.cluster.worker import OUTPUTS
from nudge.components.train.limits import NO_LIMITS, Limits
from nudge.components.train.settings import TrainSettings

ENGINES: dict[str, Engine] = {"trainjob": trainjob, "rayjob": rayjob}
STEP_CONTAINER = "main"
BUNDLE_VOLUME = "custom-ca"
"""Kubeflow Pipelines' names for the container of a step, and for the volume of certificate
authorities that its server mounts in it (backend/src/v2/compiler/argocompiler/common.go). On
OpenShift AI that bundle includes the system's authorities."""

ABANDONED_H = 14 * 24.0
"""Hours without a write after which the folder of a job that no longer exists is removed."""


def launch(settings: TrainSettings, paths: dict[str, Path], limits: Limits = NO_LIMITS) -> None:
    """Train as a job of the cluster; ``paths`` are the tokens and the outputs on this machine.

    Raises `UserError` with the cause (the rank's sentence, container states, events, the end of the
    log) if the job failed in a way that a retry would repeat, and `OverBudget` where its checkpoint
    is of use to a larger budget. Raises `Transient` if it failed for
    another reason, was deleted, was never admitted by its queue, or is not done by its deadline.
    """
    engine, run_id = ENGINES[settings.launcher], this_run("")
    if not run_id:
        raise UserError(
            f"launcher: {settings.launcher} needs the run's id in NUDGE_RUN_ID to name its job"
        )
    name, cluster = job_name(run_id), connect(settings.cluster.namespace)
    handover = Handover(f"{_root(settings)}/{name}")
    schema = cluster.schema(engine.KIND)
    if schema is None:
        raise UserError(
            f"this cluster has no {engine.KIND.name}; it comes with {engine.KIND.needs}"
        )
    with progress("train", unit="steps") as bar, _cancelled():
        _remove_abandoned(cluster, _root(settings), settings)
        adopted = _existing(cluster, engine, name, handover.uri)
        try:
            if adopted is None:
                bar.note(stage="uploading the tokens")
                _send(handover, settings, paths["tokens"], limits)
            body = engine.body(
                settings.cluster, name=name, handover=handover.uri,
                schema=schema, step=_this_step(cluster, settings.cluster.image),
            )  # fmt: skip
            job = adopted or _created(cluster, engine, body)
        except BaseException as error:
            # After a Transient the job may exist, though its answer was lost: it needs its inputs.
            if not isinstance(error, Transient):
                _clean_up(handover, keep_checkpoints=True)
            raise
        try:
            Follower(cluster, engine, job, settings.cluster, bar).follow()
        except (Late, Cancelled, KeyboardInterrupt):
            _delete(cluster, engine, job)
            _clean_up(handover, keep_checkpoints=True)
            raise
        except UserError as error:
            if not isinstance(error, Transient):
                _clean_up(handover, keep_checkpoints=isinstance(error, OverBudget))
            raise
        bar.note(stage="downloading the model")
        for output in OUTPUTS:
            handover.fetch(output, paths[output])
        _delete(cluster, engine, job)
        _clean_up(handover)


def _delete(cluster: Cluster, engine: Engine, job: dict[str, Any]) -> None:
    """Delete the job, or say what is left to do; the error that led here is not replaced."""
    name = job["metadata"]["name"]
    try:
        cluster.delete(engine.KIND, name, uid=job["metadata"]["uid"])
    except UserError as error:
        _warn(f"the {engine.KIND.name} {name} may still run; delete it by hand: {error}")


def _clean_up(handover: Handover, *, keep_checkpoints: bool = False) -> None:
    """Remove what the job leaves in its folder. Checkpoints stay where a retry can resume from
    them; a later launch removes them if none does."""
    try:
        handover.clear(keep_checkpoints=keep_checkpoints)
    except (UserError, OSError) as error:  # leftovers cost space only
        _warn(f"{handover.uri} is not removed: {error}")


def _remove_abandoned(cluster: Cluster, root: str, settings: TrainSettings) -> None:
    """Remove the folders of jobs that are gone and to which nothing was written for a long time."""
    idle_s = max(ABANDONED_H, 2 * settings.cluster.deadline_hours) * 3600
    try:
        for name in idle_folders(root, idle_s):
            if all(_is_gone(cluster, each.KIND, name) for each in ENGINES.values()):
                Handover(f"{root}/{name}").clear()
    except (UserError, OSError) as error:
        _warn(f"old folders in {root} are not removed: {error}")


def _is_gone(cluster: Cluster, kind: ResourceKind, name: str) -> bool:
    try:
        return cluster.get(kind, name) is None
    except NoSuchKind:
        return True


def _warn(text: str) -> None:
    say(f"warning: {text}")


class Cancelled(SystemExit):
    """The step received SIGTERM."""


@contextlib.contextmanager
def _cancelled() -> Iterator[None]:
    """Let SIGTERM raise `Cancelled` while the block runs."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Cancelled(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _root(settings: TrainSettings) -> str:
    if settings.cluster.exchange:
        return settings.cluster.exchange.rstrip("/")
    from nudge.components.common.clients.storage import bucket_name

    bucket = bucket_name()
    if not bucket:
        raise UserError(
            "train.cluster.exchange is empty and AWS_S3_BUCKET is not set; set it to an s3:// URI "
            "or to a folder of a shared volume that the job's pods mount too"
        )
    return f"s3://{bucket}/nudge/jobs"


def _send(handover: Handover, settings: TrainSettings, tokens: Path, limits: Limits) -> None:
    """Send the inputs: the tokens, and the same recipe with `launcher: local` for the ranks. Its
    base model is resolved here, because the nodes' account has no access to the registry."""
    there = dataclasses.replace(
        settings,
        launcher="local",
        base_model=resolved(settings.base_model),
        checkpoints=settings.checkpoints or f"{handover.uri}/{CHECKPOINTS}",
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.json"
        values = {"train": dataclasses.asdict(there), **limits.plain()}
        recipe.write_text(json.dumps(values), encoding="utf-8")
        handover.send("recipe", recipe)
    handover.send("tokens", tokens)


def _this_step(cluster: Cluster, image: str) -> Step:
    """What the job inherits from this step's pod, which the pipeline engine names in variables.
    Outside a pod that is nothing. ``image``, unless empty, overrides the pod's."""
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
        variables={
            **{each: os.environ[each] for each in PASSED_ON if each in os.environ},
            **for_nodes(),
        },
        trusted={key: value for key, value in bundle.items() if key != "name"} or None,
    )


def _existing(cluster: Cluster, engine: Engine, name: str, handover: str) -> dict[str, Any] | None:
    """The job that an earlier attempt of this run began; None if there is none or it failed.

    Deletes one that failed. Raises `UserError` if another run's job has this name.
    """
    kind = engine.KIND
    there = cluster.get(kind, name)
    if there is None:
        return None
    ours = there["metadata"].get("labels", {}).get(RUN_LABEL) == name
    if not ours or handover not in str(engine.started_with(there)):
        raise UserError(
            f"the {kind.name} {name} in namespace {cluster.namespace} belongs to another run; "
            "delete it, or start this run under another id"
        )
    if engine.stage(there) != "failed":
        return there
    cluster.delete(kind, name, uid=there["metadata"]["uid"])
    cluster.poll(kind, name, lambda job: job is None or None, timeout_s=120)
    return None


def _created(cluster: Cluster, engine: Engine, body: dict[str, Any]) -> dict[str, Any]:
    """The new job, or the one of a request whose answer was lost or of a step beside this one."""
    try:
        return cluster.create(engine.KIND, body)
    except ResourceConflict:
        name = body["metadata"]["name"]
        there = _existing(cluster, engine, name, str(engine.started_with(body)))
    if there is None:
        raise Transient(f"the {engine.KIND.name} {name} was deleted while it was created")
    return there
