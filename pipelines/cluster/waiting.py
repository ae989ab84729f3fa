"""Why a step of a run waits: for an image, a node with enough room, a quota, its turn in a queue.

The pipelines server does not report this. The run's Workflow and Kueue's Workloads do; they are
read with the user's own rights (the Role nudge-author) if this machine can reach the cluster.
"""

import base64
import gzip
import json
import time
from dataclasses import dataclass, field
from typing import Any

from nudge.components.common.clients.kube import Cluster, ResourceKind, connect
from nudge.components.common.clients.kueue import list_workloads, queue_of, why_waiting
from nudge.components.common.core.environment import PIPELINE_RUN_LABEL
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cluster.nodes import step_of

WORKFLOW = ResourceKind("argoproj.io/v1alpha1", "Workflow", "workflows", "Argo Workflows")
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
    """Why Kueue holds back the pod of a node; empty if that cannot be read."""
    number = str(node.get("id", "")).rpartition("-")[2]
    try:
        workloads = list_workloads(cluster)
    except UserError:
        return ""
    for workload in workloads:
        owners = workload["metadata"].get("ownerReferences") or []
        if any(owner["name"].rpartition("-")[2] == number for owner in owners):
            reason = why_waiting(cluster, workload) or "admitted"
            return f"in the queue {queue_of(workload)}: {reason}"
    return ""
