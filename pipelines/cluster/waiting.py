"""Why a step of a run waits: for an image, a node with enough room, a quota, its turn in a queue.

The pipelines server tells none of this; the run's Workflow does, and Kueue's Workloads. They are
read with the rights of the person (the Role nudge-author) where a cluster is known here.
"""

import base64
import gzip
import json
import time
from dataclasses import dataclass, field
from typing import Any

from nudge.components.common.clients.kube import Cluster, ResourceKind, connect
from nudge.components.common.core.environment import PIPELINE_RUN_LABEL
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cluster.nodes import step_of

WORKFLOW = ResourceKind("argoproj.io/v1alpha1", "Workflow", "workflows", "Argo Workflows")
WORKLOAD = ResourceKind("kueue.x-k8s.io/v1beta1", "Workload", "workloads", "Kueue")
INTERVAL_S = 15.0
PATIENCE_S = 5.0
GATED = "SchedulingGated"
ROUTINE = ("ContainerCreating", "PodInitializing")
ACTIVE = ("Pending", "Running")


@dataclass
class Waiting:
    """The reasons for which the steps of one run wait; ``problem`` says why they cannot be read."""

    run_id: str
    namespace: str = ""
    problem: str = ""
    _cluster: Cluster | None = None
    _next: float = 0.0
    _reasons: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> dict[str, str]:
        """Step to reason, at most `INTERVAL_S` old; empty where nothing is known to wait."""
        if self.problem or time.monotonic() < self._next:
            return self._reasons
        try:
            if self._cluster is None:
                self._cluster = connect(self.namespace, PATIENCE_S)
            self._reasons = dict(_reasons(self._cluster, self.run_id))
        except UserError as error:
            self._reasons, self.problem = {}, str(error)
        self._next = time.monotonic() + INTERVAL_S
        return self._reasons


def _reasons(cluster: Cluster, run_id: str) -> list[tuple[str, str]]:
    found = []
    for workflow in cluster.list(WORKFLOW, {PIPELINE_RUN_LABEL: run_id}):
        for node in _nodes(workflow.get("status") or {}):
            message = str(node.get("message") or "")
            name = step_of(str(node.get("name", "")))
            if not name or node.get("phase") not in ACTIVE or message in ("", *ROUTINE):
                continue
            if GATED in message:
                message = _queue(cluster, node) or message
            found.append((name, " ".join(message.split())))
    return found


def _nodes(status: dict[str, Any]) -> list[dict[str, Any]]:
    if packed := status.get("compressedNodes"):
        return list(json.loads(gzip.decompress(base64.b64decode(packed))).values())
    return list((status.get("nodes") or {}).values())


def _queue(cluster: Cluster, node: dict[str, Any]) -> str:
    """What Kueue says of the pod of a node that it holds back; empty if that cannot be read."""
    number = str(node.get("id", "")).rpartition("-")[2]
    try:
        workloads = cluster.list(WORKLOAD)
    except UserError:
        return ""
    for workload in workloads:
        owners = workload["metadata"].get("ownerReferences") or []
        if any(owner["name"].rpartition("-")[2] == number for owner in owners):
            queue = workload.get("spec", {}).get("queueName", "")
            held = [
                str(each.get("message", ""))
                for each in (workload.get("status") or {}).get("conditions", [])
                if (each["type"], each["status"]) == ("QuotaReserved", "False")
            ]
            return f"in the queue {queue}: {'; '.join(held) or 'not admitted yet'}"
    return ""
