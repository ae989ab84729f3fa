"""Follow a job of the cluster until it is complete: its log, its troubles, its turn in a queue.

The job runs on its own, so losing sight of it changes nothing: an unreadable log, a missing right
or an unreachable API server is reported, and the cluster is asked again until the deadline.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from nudge.components.common.clients.kube import POD, Cluster
from nudge.components.common.clients.kueue import queue_of, why_waiting, workload_of
from nudge.components.common.clients.pods import (
    QUEUE,
    RESTARTED,
    LogTail,
    containers,
    troubles,
    why_of,
)
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.progress import SHOWN, Progress
from nudge.components.common.core.say import say
from nudge.components.common.core.step import FAILURE, REFUSAL
from nudge.components.train.cluster.jobs import Engine, seconds_left
from nudge.components.train.cluster.worker import PERMANENT
from nudge.components.train.settings import LaunchSettings

POLL_S = 5.0
REPEAT_S = 60.0
"""How often a line that has not changed is printed."""

QUEUE_POLL_S = 15.0
"""How often Kueue's Workload is read while a job waits."""

UNSEEN_S = 10.0
"""Kueue makes a Workload within a second or two; a job that has none after this time needs help."""

LONGER = "raise train.cluster.deadline_hours if it needs longer"


class Late(Transient):
    """The job is not done by its deadline, or its queue never admitted it."""


class Follower:
    """Follows one job; made from the object that was created or adopted."""

    def __init__(
        self,
        cluster: Cluster,
        engine: Engine,
        job: Mapping[str, Any],
        settings: LaunchSettings,
        bar: Progress,
    ) -> None:
        self._cluster, self._engine, self._job = cluster, engine, dict(job)
        self._settings, self._bar = settings, bar
        self._name, self._uid = job["metadata"]["name"], job["metadata"]["uid"]
        self._title = f"{engine.KIND.name} {self._name}"
        self._tail: tuple[str, LogTail] | None = None
        self._printed: dict[str, float] = {}
        self._stage = ("", 0.0)
        self._wait = ("", -QUEUE_POLL_S)
        self._workload = ""
        self._waiting_since: float | None = None

    def follow(self) -> None:
        """Return when the job is complete.

        Raises `UserError` with the cause as soon as a rank fails for good (`OverBudget` where the
        budget stopped it), `Transient` if the job failed for another reason or was deleted, and
        `Late` at the deadline.
        """
        end = time.monotonic() + seconds_left(self._job, self._settings)
        while True:
            problem = ""
            try:
                found = self._cluster.get(self._engine.KIND, self._name)
            except UserError as error:
                problem = f"{error}"
            else:
                if self._is_complete(found):
                    return
            if time.monotonic() >= end:
                hours = f"{self._settings.deadline_hours:g} h after its creation"
                why = problem or self._why_late(found)
                raise Late(f"the {self._title} is not done {hours}: {why}\n{LONGER}")
            if problem:
                self._print("sight", f"cannot see the job, which keeps running: {problem}")
            time.sleep(POLL_S)

    def _is_complete(self, found: dict[str, Any] | None) -> bool:
        if found is None or found["metadata"]["uid"] != self._uid:
            raise Transient(f"the {self._title} was deleted before it was complete")
        self._job = found
        stage, status = self._engine.stage(found), self._engine.describe_status(found)
        pods = self._pods()
        if stage == "suspended":
            self._tail = None  # a job that is admitted once more has new pods
            self._show_stage(self._waiting())
        else:
            self._waiting_since = None
            self._read_log(pods)
        for key, line in troubles(pods).items():
            self._print(key, line, once=key.startswith(RESTARTED))
        refusal, permanent = self._engine.refusal(found), permanent_end(pods)
        if stage != "failed" and permanent is None:
            return stage == "complete"
        why = why_of(self._cluster, pods, found, logs=refusal is None)
        cause = "\n".join(f"{part}" for part in (refusal, why) if part)
        if kind := type(refusal) if refusal else permanent:
            if stage != "failed":  # its controller would only repeat the failure
                self._delete()
            raise kind(f"the {self._title} failed: {cause}\n{status}".rstrip())
        longer = f"; {LONGER}" if "DeadlineExceeded" in status else ""
        raise Transient(f"the {self._title} failed: {status}{longer}\n{cause}".rstrip())

    def _delete(self) -> None:
        try:
            self._cluster.delete(self._engine.KIND, self._name, uid=self._uid)
        except UserError as error:
            self._print("delete", f"the job may still run; delete it by hand: {error}")

    def _why_late(self, found: dict[str, Any] | None) -> str:
        status = self._engine.describe_status(found) if found else "it is gone"
        if found and self._engine.stage(found) == "suspended":
            queue = self._queue()
            status = f"queue {queue or '(none)'} never admitted it: {self._wait[0] or status}"
        try:
            why = why_of(self._cluster, self._pods(), found)
        except UserError:
            why = ""
        return f"{status}\n{why}".rstrip()

    def _pods(self) -> list[dict[str, Any]]:
        """The job's pods, oldest first; empty where they cannot be read."""
        try:
            pods = self._cluster.list(POD, self._engine.pods(self._name))
        except UserError as error:
            self._print("pods", f"cannot read the job's pods: {error}")
            return []
        return pods_of(self._job, pods)

    def _read_log(self, pods: Sequence[Mapping[str, Any]]) -> None:
        """Print new lines of the first rank's log, and show the progress in them."""
        labels, container = self._engine.LOG
        found = [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]
        if not found:
            self._show_stage("waiting for the pods")
            return
        newest = found[-1]["metadata"]
        if self._tail is None or self._tail[0] != newest["uid"]:
            if self._tail is not None:
                self._print(newest["uid"], f"following the new pod {newest['name']}")
            self._tail = (newest["uid"], LogTail(self._cluster, newest["name"], container))
            self._show_stage("training")
        try:
            lines = self._tail[1].lines()
        except UserError as error:
            self._print("log", f"cannot read the log of pod {newest['name']}: {error}")
            return
        for line in map(self._engine.plain, lines):
            match = SHOWN.fullmatch(line.strip())
            if match and match[1] == "train" and match[3]:
                self._bar.total = float(match[3])
                self._bar.advance(float(match[2]) - self._bar.done, job=match[5])
            else:
                say(f"{self._name}: {line}")

    def _queue(self) -> str:
        """The LocalQueue of the job, which Kueue sets to `default` where a job names none."""
        labels = self._job["metadata"].get("labels") or {}
        return str(labels.get(QUEUE) or self._settings.queue)

    def _waiting(self) -> str:
        """Why the job is suspended, in one line."""
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        if now - self._wait[1] >= QUEUE_POLL_S:
            self._wait = (self._reason(now - self._waiting_since), now)
        queue, reason = self._queue(), self._wait[0]
        where = f"waiting in the queue {queue}" if queue else "suspended"
        return f"{where}: {reason}" if reason else where

    def _reason(self, waited_s: float) -> str:
        """What Kueue's Workload reports; empty if there is nothing yet."""
        try:
            workload = workload_of(self._cluster, self._uid, self._workload)
        except UserError as error:
            self._print("workload", f"cannot read why the job waits: {error}")
            return ""
        if workload is None:
            return self._no_workload() if waited_s >= UNSEEN_S else ""
        self._workload = workload["metadata"]["name"]
        reason = why_waiting(self._cluster, workload)
        queue = queue_of(workload)
        return reason if queue in ("", self._queue()) else f"{queue}: {reason}"

    def _no_workload(self) -> str:
        priority = self._settings.priority_class
        if priority:
            return (
                f"Kueue has made no Workload for it; check that the WorkloadPriorityClass "
                f"{priority!r} (train.cluster.priority_class) exists"
            )
        if not self._queue():
            return "it names no queue; set train.cluster.queue, or resume it by hand"
        return "Kueue has made no Workload for it; check that Kueue manages this kind and namespace"

    def _show_stage(self, stage: str) -> None:
        """Show a stage when it changes, and once a minute."""
        now = time.monotonic()
        if stage != self._stage[0] or now - self._stage[1] >= REPEAT_S:
            self._bar.note(stage=stage)
            self._stage = (stage, now)

    def _print(self, key: str, line: str, *, once: bool = False) -> None:
        """Print a line when its ``key`` is new and, unless ``once``, every minute from then on."""
        now = time.monotonic()
        printed = self._printed.get(key)
        if printed is None or (not once and now - printed >= REPEAT_S):
            say(f"{self._name}: {line}")
            self._printed[key] = now


def pods_of(job: Mapping[str, Any], pods: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those pods that belong to this job and not to an earlier one of the same name.

    A pod's owners are the controllers between it and the job, so only a pod that names the job
    itself can be matched by uid. The others are older than the job if they are not its own. Oldest
    first; pods that are being deleted come before the others.
    """
    meta = job["metadata"]
    found = []
    for pod in pods:
        owners = pod["metadata"].get("ownerReferences") or []
        named = [each["uid"] for each in owners if each["kind"] == job.get("kind")]
        if named and meta["uid"] not in named:
            continue
        if pod["metadata"]["creationTimestamp"] >= meta["creationTimestamp"]:
            found.append(pod)
    return sorted(
        found,
        key=lambda pod: (
            "deletionTimestamp" not in pod["metadata"],
            pod["metadata"]["creationTimestamp"],
        ),
    )


def permanent_end(pods: Sequence[Mapping[str, Any]]) -> type[UserError] | None:
    """The kind of error with which a container ended that a restart would only repeat: killed for
    memory, or with an exit status of our own. None without one, and for a pod that the cluster
    moves away."""
    for pod in pods:
        conditions = pod.get("status", {}).get("conditions") or []
        if any((e["type"], e["status"]) == ("DisruptionTarget", "True") for e in conditions):
            continue
        for status in containers(pod):
            for field in ("state", "lastState"):
                end = status.get(field, {}).get("terminated") or {}
                code, sentence = end.get("exitCode"), str(end.get("message") or "")
                refused = sentence.startswith(REFUSAL)
                refused |= code in PERMANENT and not sentence.startswith(FAILURE)
                if code and (refused or end.get("reason") == "OOMKilled"):
                    return PERMANENT.get(code, UserError)
    return None
