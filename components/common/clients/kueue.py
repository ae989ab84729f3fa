"""Why Kueue keeps a job or a pod waiting: the conditions of its Workload, and its position."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from nudge.components.common.clients.kube import Cluster, ResourceKind
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.quantities import UNITS, quantity

WORKLOAD = ResourceKind("kueue.x-k8s.io/v1beta1", "Workload", "workloads", "Kueue")
"""In its oldest version; `served` has the one to ask for."""

LOCAL_QUEUES = tuple(
    ResourceKind(f"visibility.kueue.x-k8s.io/{version}", "LocalQueue", "localqueues", "Kueue")
    for version in ("v1beta2", "v1beta1")
)
"""Kueue's visibility API, newest version first: an aggregated API that a cluster may not serve."""
PENDING, PATIENCE_S = "pendingworkloads", 2.0
PAGE = 1000
"""Workloads per request: as many as Kueue returns by default, from the front of the queue."""

NEVER_FITS = re.compile(
    r"insufficient quota for (?P<resource>\S+) in flavor (?P<flavor>\S+), previously considered "
    r"podsets requests \((?P<others>\S+)\) \+ current podset request \((?P<own>\S+)\) > maximum "
    r"capacity \((?P<most>[^)\s]+)\)"
)
IN_USE = re.compile(
    r"insufficient unused quota for (?P<resource>\S+) in flavor (?P<flavor>[^\s,]+), "
    r"(?P<short>[0-9.]+[A-Za-z]*) more needed"
)
NO_QUEUE = re.compile(r"(LocalQueue|ClusterQueue) +(\S*) ?doesn't exist")
SELECTOR = "doesn't match ClusterQueue selector"


def served(cluster: Cluster) -> ResourceKind:
    """Workloads in the version that the cluster prefers."""
    version = cluster.preferred_version(WORKLOAD.group)
    return dataclasses.replace(WORKLOAD, api_version=version) if version else WORKLOAD


def list_workloads(cluster: Cluster) -> list[dict[str, Any]]:
    """The namespace's Workloads; raises `UserError` if they cannot be read."""
    return cluster.list(served(cluster))


def workload_of(cluster: Cluster, uid: str, name: str = "") -> dict[str, Any] | None:
    """The newest Workload that Kueue made for the object with this uid, or None.

    ``name`` is that of the Workload, if known: reading one is cheaper than listing all.
    """
    if name:
        same = cluster.get(served(cluster), name)
        if same is not None and _is_owned(same, uid):
            return dict(same)
    found = [each for each in list_workloads(cluster) if _is_owned(each, uid)]
    return max(found, key=lambda each: each["metadata"]["creationTimestamp"], default=None)


def _is_owned(workload: Mapping[str, Any], uid: str) -> bool:
    owners = workload["metadata"].get("ownerReferences") or []
    return any(owner["uid"] == uid for owner in owners)


def queue_of(workload: Mapping[str, Any]) -> str:
    """The LocalQueue that a Workload waits in, and its ClusterQueue once that has admitted it."""
    queue = str((workload.get("spec") or {}).get("queueName") or "")
    admission = (workload.get("status") or {}).get("admission") or {}
    cluster_queue = admission.get("clusterQueue")
    return f"{queue} (ClusterQueue {cluster_queue})" if cluster_queue else queue


def why_waiting(cluster: Cluster, workload: Mapping[str, Any]) -> str:
    """As `explain_wait`, with the position in the queue if the cluster reports it."""
    reason = explain_wait(workload, cluster.namespace)
    position = queue_position(cluster, workload) if reason else ""
    return f"{position}; {reason}" if position else reason


def queue_position(cluster: Cluster, workload: Mapping[str, Any]) -> str:
    """The position of a waiting Workload in its LocalQueue, such as ``position 3 of 7``; empty if
    Kueue does not report it or does not let this account read it."""
    queue = str((workload.get("spec") or {}).get("queueName") or "")
    if not queue:
        return ""
    for kind in LOCAL_QUEUES:
        try:
            found = _position(cluster, kind, queue, workload["metadata"]["name"])
        except UserError:
            return ""
        if found is not None:
            return found
    return ""


def _position(cluster: Cluster, kind: ResourceKind, queue: str, name: str) -> str | None:
    """As `queue_position`; None if the cluster has no queue of this kind and name."""
    for offset in itertools.count(step=PAGE):
        page = cluster.subresource(
            kind, queue, PENDING, PATIENCE_S, offset=str(offset), limit=str(PAGE)
        )
        if page is None:
            return None if offset == 0 else ""
        waiting = page.get("items") or []
        last = len(waiting) < PAGE
        for each in waiting:
            if each["metadata"]["name"] == name:
                total = str(offset + len(waiting)) if last else f"{offset + PAGE} or more"
                return f"position {each['positionInLocalQueue'] + 1} of {total}"
        if last:
            break
    return ""


def explain_wait(workload: Mapping[str, Any], namespace: str = "") -> str:
    """Why a Workload is not admitted, in one line; empty if it is."""
    status = workload.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    quota = conditions.get("QuotaReserved", {})
    if quota.get("status") == "True":
        pending = [
            f"admission check {check['name']}: {check.get('message') or check['state']}"
            for check in status.get("admissionChecks") or []
            if check.get("state") != "Ready"
        ]
        return "; ".join(pending) if conditions.get("Admitted", {}).get("status") != "True" else ""
    evicted = conditions.get("Evicted", {})
    reasons = []
    if evicted.get("status") == "True":
        kind = "preempted" if evicted.get("reason") == "Preempted" else "evicted"
        reasons.append(f"{kind}: {evicted.get('message') or evicted.get('reason', '')}")
    message = str(quota.get("message") or "")
    if message and message != evicted.get("message"):
        reasons.append(_explained(message, namespace))
    if not (workload.get("spec") or {}).get("active", True):
        reasons.append("somebody deactivated the Workload (spec.active: false)")
    return " ".join("; ".join(reasons).split()) or "Kueue has not reported a reason yet"


def _explained(message: str, namespace: str) -> str:
    """Kueue's message with what is short, by how much, or what to change in front of it."""
    lines = [
        f"{found['resource']} never fits in flavor {found['flavor']}: {found['own']} requested"
        + (f" besides {found['others']}" if found["others"] != "0" else "")
        + f", at most {found['most']} in all, {_short(found)} too much"
        for found in NEVER_FITS.finditer(message)
    ]
    lines += [
        f"{found['resource']} is in use in flavor {found['flavor']}: {found['short']} more needed"
        for found in IN_USE.finditer(message)
    ]
    if "Pending the preemption" in message:
        lines.append("waiting for preempted workloads to end")
    if match := NO_QUEUE.search(message):
        name = f"{match[1]} {match[2] or '(no name)'}"
        lines.append(f"there is no {name}; name another queue or have this one created")
    if SELECTOR in message:
        lines.append(
            f"the ClusterQueue takes no jobs of namespace {namespace or 'this project'}; have its "
            "namespaceSelector changed or use another queue"
        )
    return f"{'; '.join(lines)} ({message})" if lines else message


def _short(found: re.Match[str]) -> str:
    amount = quantity(found["own"]) + quantity(found["others"]) - quantity(found["most"])
    for unit in ("Gi", "Mi", "Ki") if found["own"].endswith("i") else ("", "m"):
        if amount % UNITS[unit] == 0:
            return f"{int(amount / UNITS[unit])}{unit}"
    return f"{amount.normalize():f}"
