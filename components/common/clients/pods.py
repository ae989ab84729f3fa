"""Pods: why they do not run or have failed, their log lines as they arrive, and two constants that
every pod needs (its security context and the label of its queue)."""

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
"""The securityContext that a namespace with the level `restricted` requires of a container:
https://kubernetes.io/docs/concepts/security/pod-security-standards."""

QUEUE = "kueue.x-k8s.io/queue-name"
"""The label that names the Kueue LocalQueue in which a job, a server or a workbench waits."""

TAIL_LINES = 20
ROUTINE = ("VirtualServiceCRDNotFound", "UpdateFailed")
"""Warnings that KServe records for working services: no Istio, and conflicts that it retries."""
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
    """Why these pods do not run or have failed, one cause per line; empty if nothing is wrong.

    Includes waiting and terminated containers with their reasons, warnings from the events of the
    pods and of ``owner``, and the end of the log of the container that failed first.
    """
    lines: list[str] = []
    failures: list[tuple[str, str, str]] = []
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                lines.append(f"pod {name} is not scheduled: {condition.get('message', '')}")
        if status.get("reason"):  # for the pod, not a container: Evicted, DeadlineExceeded, ...
            lines.append(f"pod {name}: {status['reason']} {status.get('message', '')}".rstrip())
        for container in containers(pod):
            if problem := _problem(container):
                lines.append(f"pod {name}, container {container['name']}: {problem}")
            if end := failed(container):
                failures.append((str(end.get("finishedAt", "")), name, container["name"]))
    if events:
        for pod in pods:
            resolved = ("FailedMount",) if _has_started(pod) else ()
            lines += warnings(cluster, pod, resolved)
        lines += warnings(cluster, owner) if owner else []
    if failures and logs:
        # The first failure is the cause; the others in a group fail because of it.
        _, pod_name, container_name = min(failures)
        if log := end_of_log(cluster, pod_name, container_name):
            lines += [f"the end of the log of pod {pod_name}:", *(f"  {line}" for line in log)]
    return "\n".join(dict.fromkeys(lines))


def warnings(cluster: Cluster, object: Mapping[str, Any], without: Sequence[str] = ()) -> list[str]:
    """The warnings among an object's events, oldest first; none without permission to read them.

    Leaves out the `ROUTINE` ones and those whose reason is in ``without``.
    """
    meta = object["metadata"]
    try:
        events = cluster.list(EVENT, involvedObject__uid=meta["uid"])
    except UserError:  # a missing permission must not hide the other causes
        return []
    events.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    kind = object.get("kind", "Pod")
    return [
        f"{kind} {meta['name']}: {event.get('reason', '')}: {event.get('message', '')}"
        for event in events
        if event.get("type") == "Warning" and event.get("reason") not in (*ROUTINE, *without)
    ]


def end_of_log(cluster: Cluster, pod: str, container: str) -> list[str]:
    """The last lines of a container's log; none if there is no log or no permission to read it."""
    try:
        return cluster.log(pod, container, tailLines=str(TAIL_LINES)).splitlines()
    except UserError:
        return []


class LogTail:
    """The lines of a container's log as they arrive, each once, also after a lost connection."""

    def __init__(self, cluster: Cluster, pod: str, container: str) -> None:
        self._cluster, self._pod, self._container = cluster, pod, container
        self._last = ("", "")
        self._seen = 0
        """The number of lines with the timestamp ``_last`` that were returned already."""

    def lines(self) -> list[str]:
        """The new lines since the last call; none until the container has started."""
        query = {"timestamps": "true"}
        if self._last[0]:
            query["sinceTime"] = f"{self._last[0]}Z"  # the API rounds it to seconds
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


def _problem(status: Mapping[str, Any]) -> str:
    """The problem of a container, or an empty string."""
    waiting = status.get("state", {}).get("waiting") or {}
    if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
        return f"waits: {waiting['reason']} {waiting.get('message', '')}".rstrip()
    if end := failed(status):
        code = end.get("exitCode")
        hint = "; it needs more memory" if end.get("reason") == "OOMKilled" else ""
        return f"ended with {end.get('reason', 'Error')}, status {code}{hint}"
    return ""


def failed(status: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a container last terminated, if it failed and has not recovered since."""
    if status.get("ready"):
        return None
    for key in ("state", "lastState"):
        end = status.get(key, {}).get("terminated")
        if end and end.get("exitCode"):
            return dict(end)
    return None


def _has_started(pod: Mapping[str, Any]) -> bool:
    return any("running" in (each.get("state") or {}) for each in containers(pod))
