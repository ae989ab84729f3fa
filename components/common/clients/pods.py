"""Pods: what each container of one says of its rights, the queue that it waits in, why one does not
run or has ended, and the lines of its log as they come."""

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
"""The securityContext that a namespace of the level `restricted` asks of a container:
https://kubernetes.io/docs/concepts/security/pod-security-standards."""

QUEUE = "kueue.x-k8s.io/queue-name"
"""The label that names the LocalQueue of Kueue which a job, a server or a workbench waits in."""

TAIL_LINES = 20
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

    Waiting and ended containers with their reasons, warnings from the events of the pods and of
    ``owner``, and the end of the first failed container's log. Empty if nothing is wrong.
    """
    told: list[str] = []
    ended: list[tuple[str, str, str]] = []
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for found in status.get("conditions", []):
            if found["type"] == "PodScheduled" and found["status"] == "False":
                told.append(f"pod {name} is not scheduled: {found.get('message', '')}")
        if status.get("reason"):  # the pod as a whole: Evicted, DeadlineExceeded, ...
            told.append(f"pod {name}: {status['reason']} {status.get('message', '')}".rstrip())
        for container in containers(pod):
            said = _container(container)
            if said:
                told.append(f"pod {name}, container {container['name']}: {said}")
            if end := failed(container):
                ended.append((str(end.get("finishedAt", "")), name, container["name"]))
    if events:
        for pod in pods:
            resolved = ("FailedMount",) if _has_started(pod) else ()
            told += warnings(cluster, pod, resolved)
        told += warnings(cluster, owner) if owner else []
    if ended and logs:
        # The first to fail is the cause; the others of a group end because of it.
        _, pod_name, container_name = min(ended)
        lines = end_of_log(cluster, pod_name, container_name)
        if lines:
            told += [f"the end of the log of pod {pod_name}:", *(f"  {line}" for line in lines)]
    return "\n".join(dict.fromkeys(told))


def warnings(cluster: Cluster, object: Mapping[str, Any], without: Sequence[str] = ()) -> list[str]:
    """The warnings among an object's events, oldest first, or none where they may not be read.

    Leaves out the `ROUTINE` ones and those whose reason is in ``without``.
    """
    meta = object["metadata"]
    try:
        events = cluster.list(EVENT, involvedObject__uid=meta["uid"])
    except UserError:  # a cause is told without them rather than hidden behind a missing right
        return []
    events.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    kind = object.get("kind", "Pod")
    return [
        f"{kind} {meta['name']}: {event.get('reason', '')}: {event.get('message', '')}"
        for event in events
        if event.get("type") == "Warning" and event.get("reason") not in (*ROUTINE, *without)
    ]


def end_of_log(cluster: Cluster, pod: str, container: str) -> list[str]:
    """The last lines of a container's log, or none where it has none or may not be read."""
    try:
        return cluster.log(pod, container, tailLines=str(TAIL_LINES)).splitlines()
    except UserError:
        return []


class LogTail:
    """The lines of a container's log as they come, each once, also after a lost connection."""

    def __init__(self, cluster: Cluster, pod: str, container: str) -> None:
        self._cluster, self._pod, self._container = cluster, pod, container
        self._last = ("", "")
        self._seen = 0
        """Lines given already that carry the stamp ``_last``."""

    def lines(self) -> list[str]:
        """The lines that came since the last call; none while the container has not started."""
        query = {"timestamps": "true"}
        if self._last[0]:
            query["sinceTime"] = f"{self._last[0]}Z"  # of whole seconds, whatever is asked for
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
    """The statuses of a pod's containers, those that prepare it first."""
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
    if end := failed(status):
        code = end.get("exitCode")
        hint = "; it needs more memory" if end.get("reason") == "OOMKilled" else ""
        return f"ended with {end.get('reason', 'Error')}, status {code}{hint}"
    return ""


def failed(status: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a container last ended, if it failed and has not come back since."""
    if status.get("ready"):
        return None
    for place in ("state", "lastState"):
        end = status.get(place, {}).get("terminated")
        if end and end.get("exitCode"):
            return dict(end)
    return None


def _has_started(pod: Mapping[str, Any]) -> bool:
    return any("running" in (each.get("state") or {}) for each in containers(pod))
