"""Pods: the rights of their containers, the label of their queue, why one does not run or has
ended, and the lines of a log as they are written."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nudge.components.common.clients.kube import EVENT, POD, Cluster
from nudge.components.common.core.errors import UserError

RESTRICTED: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""The securityContext that a namespace of the level `restricted` requires of a container:
https://kubernetes.io/docs/concepts/security/pod-security-standards."""

QUEUE = "kueue.x-k8s.io/queue-name"
"""The label with the name of the Kueue LocalQueue that a job, a server or a workbench waits in."""

TAIL_LINES = 20
BANNER_LINES = 180
"""How much further back a log is read, for torchrun's report of failed ranks, which is cut off."""

TORCHRUN_REPORT = re.compile(r".*\bfailed \(exitcode: -?\d+\) local_rank: \d+ \(pid: \d+\)")
TORCHRUN_NOTICE = re.compile(r"[IWE]\d{4} \d\d:\d\d:\d\d\S* .*torch/distributed/")
RESTARTED = "restarted "
PREFIX = re.compile(r"(?:error|failed): ")
"""How our own termination messages begin, see `nudge.components.common.core.step`."""

ROUTINE = ("VirtualServiceCRDNotFound", "UpdateFailed")
"""Warnings that KServe records of services that work: no Istio, and conflicts that it retries."""
STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z ?(.*)")


def why(cluster: Cluster, labels: Mapping[str, str], owner: Mapping[str, Any] | None = None) -> str:
    """Why the pods with these labels do not run or have failed; see `why_of`."""
    return why_of(cluster, cluster.list(POD, labels), owner)


def why_of(
    cluster: Cluster,
    pods: Sequence[Mapping[str, Any]],
    owner: Mapping[str, Any] | None = None,
    *,
    logs: bool = True,
    events: bool = True,
) -> str:
    """Why these pods do not run or have failed, as plain lines.

    Waiting and ended containers with their reasons and their own last sentences (termination
    messages), and warnings from the events of the pods and of ``owner``. Where the first container
    that failed left no sentence, the end of its log. Empty if nothing is wrong.
    """
    lines: list[str] = []
    ended: list[tuple[str, str, str, str]] = []
    for pod in pods:
        name = pod["metadata"]["name"]
        lines += _of_the_pod(pod)
        for container in containers(pod):
            if problem := _container(container):
                lines.append(f"pod {name}, container {container['name']}: {problem}")
            if end := failed(container):
                sentence = str(end.get("message") or "")
                ended.append((str(end.get("finishedAt", "")), name, container["name"], sentence))
    if events:
        for pod in pods:
            resolved = ("FailedMount",) if _has_started(pod) else ()
            lines += warnings(cluster, pod, resolved)
        lines += warnings(cluster, owner) if owner else []
    if ended and logs:
        # The first to fail is the cause; the others of a group end because of it.
        _, pod_name, container_name, sentence = min(ended)
        log = [] if sentence else end_of_log(cluster, pod_name, container_name)
        if log:
            lines += [f"the end of the log of pod {pod_name}:", *(f"  {line}" for line in log)]
    return "\n".join(dict.fromkeys(lines))


def troubles(pods: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is wrong with pods right now and which containers were restarted, one line per trouble.

    The key stays the same while a trouble lasts, though its message may change. Keys of restarts
    begin with `RESTARTED`.
    """
    found: dict[str, str] = {}
    for pod in pods:
        name, uid = pod["metadata"]["name"], pod["metadata"].get("uid", "")
        for line in _of_the_pod(pod):
            found[f"{uid} {line.partition(':')[0]}"] = line
        for status in containers(pod):
            where = f"pod {name}, container {status['name']}"
            count = status.get("restartCount", 0)
            if problem := _container(status):
                reason = " ".join(problem.split()[:3])
                found[f"{uid} {status['name']} {count} {reason}"] = f"{where}: {problem}"
            last = status.get("lastState", {}).get("terminated")
            if count and last:
                times = "once" if count == 1 else f"{count} times"
                ended = _end(last)
                found[f"{RESTARTED}{uid} {status['name']} {count}"] = (
                    f"{where}: restarted {times}: {ended}"
                )
    return found


def _of_the_pod(pod: Mapping[str, Any]) -> list[str]:
    """What is wrong with a pod, apart from its containers."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    lines = [
        f"pod {name} is not scheduled: {found.get('message', '')}"
        for found in status.get("conditions", [])
        if (found["type"], found["status"]) == ("PodScheduled", "False")
    ]
    if status.get("reason"):  # Evicted, DeadlineExceeded, ...
        lines.append(f"pod {name}: {status['reason']} {status.get('message', '')}".rstrip())
    return lines


def warnings(cluster: Cluster, object: Mapping[str, Any], without: Sequence[str] = ()) -> list[str]:
    """The warnings among an object's events, oldest first, or none where they may not be read.

    Leaves out the `ROUTINE` ones and those whose reason is in ``without``.
    """
    meta = object["metadata"]
    try:
        events = cluster.list(EVENT, involvedObject__uid=meta["uid"])
    except UserError:  # the cause is reported without them, not hidden behind a missing right
        return []
    events.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    kind = object.get("kind", "Pod")
    return [
        f"{kind} {meta['name']}: {event.get('reason', '')}: {event.get('message', '')}"
        for event in events
        if event.get("type") == "Warning" and event.get("reason") not in (*ROUTINE, *without)
    ]


def end_of_log(cluster: Cluster, pod: str, container: str) -> list[str]:
    """The last lines of a container's log without torchrun's report of which ranks failed; empty
    where there is no log or it may not be read."""
    try:
        lines = cluster.log(pod, container, tailLines=str(TAIL_LINES + BANNER_LINES)).splitlines()
    except UserError:
        return []
    own: list[str] = []
    for line in lines:
        if TORCHRUN_REPORT.match(line):
            break
        if not TORCHRUN_NOTICE.match(line):
            own.append(line)
    return own[-TAIL_LINES:]


class LogTail:
    """The lines of a container's log, each returned once, also after a lost connection."""

    def __init__(self, cluster: Cluster, pod: str, container: str) -> None:
        self._cluster, self._pod, self._container = cluster, pod, container
        self._last = ("", "")
        self._seen = 0
        """How many lines with the time stamp ``_last`` were returned already."""

    def lines(self) -> list[str]:
        """The lines written since the last call; none while the container has not started."""
        query = {"timestamps": "true"}
        if self._last[0]:
            query["sinceTime"] = f"{self._last[0]}Z"  # the API has a resolution of one second
        try:
            text = self._cluster.log(self._pod, self._container, **query)
        except UserError as error:
            if "waiting to start" in str(error) or "not found" in str(error):
                return []
            raise
        fresh, same = [], 0
        for line in text.splitlines():
            stamped = STAMPED.fullmatch(line)
            if stamped is None:
                continue
            stamp = (stamped[1], (stamped[2] or ".").ljust(10, "0"))
            if stamp < self._last:
                continue
            same = same + 1 if stamp == self._last else 1
            if stamp == self._last and same <= self._seen:
                continue
            self._last, self._seen = stamp, same
            fresh.append(stamped[3])
        return fresh


def containers(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The statuses of a pod's containers, init containers first."""
    status = pod.get("status", {})
    return [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]


def _container(status: Mapping[str, Any]) -> str:
    """What is wrong with a container, or an empty string."""
    waiting = status.get("state", {}).get("waiting") or {}
    if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
        return f"waits: {waiting['reason']} {waiting.get('message', '')}".rstrip()
    end = failed(status)
    return _end(end) if end else ""


def _end(end: Mapping[str, Any]) -> str:
    """How a container ended: reason, exit code and its own last sentence."""
    hint = "; it needs more memory" if end.get("reason") == "OOMKilled" else ""
    sentence = PREFIX.sub("", str(end.get("message") or "").strip(), count=1)
    text = f"ended with {end.get('reason', 'Error')}, status {end.get('exitCode')}{hint}"
    return f"{text}: {sentence}" if sentence else text


def failed(status: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a container last ended, if it failed and is not ready since then."""
    if status.get("ready"):
        return None
    for field in ("state", "lastState"):
        end = status.get(field, {}).get("terminated")
        if end and end.get("exitCode"):
            return dict(end)
    return None


def _has_started(pod: Mapping[str, Any]) -> bool:
    return any("running" in (each.get("state") or {}) for each in containers(pod))
