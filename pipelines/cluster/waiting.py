"""Why a step of a run waits: for an image, a node with enough room, a quota, its turn in a queue;
and whether an attempt of it was killed because its memory ran out.

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
from nudge.pipelines.steps import STEPS

WORKFLOW = ResourceKind("argoproj.io/v1alpha1", "Workflow", "workflows", "Argo Workflows")
INTERVAL_S = 15.0
PATIENCE_S = 5.0
GATED = "SchedulingGated"
ROUTINE = ("ContainerCreating", "PodInitializing")
ACTIVE = ("Pending", "Running")
OOM = "OOMKilled"
"""The beginning of Argo's message about a pod that was killed because its memory ran out
(argo-workflows, workflow/controller/operator.go: ``inferFailedReason``)."""


@dataclass
class Waiting:
    """What the steps of one run wait for; ``problem`` says why that cannot be read."""

    run_id: str
    namespace: str = ""
    problem: str = ""
    _cluster: Cluster | None = None
    _next: float = 0.0
    _reasons: dict[str, str] = field(default_factory=dict)

    def reasons(self, *, now: bool = False) -> dict[str, str]:
        """Step to a sentence, at most `INTERVAL_S` old unless ``now``; empty if all is well."""
        if self.problem or (time.monotonic() < self._next and not now):
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
    killed, waits = [], []
    for workflow in cluster.list(WORKFLOW, {PIPELINE_RUN_LABEL: run_id}):
        for node in _nodes(workflow.get("status") or {}):
            message = str(node.get("message") or "")
            name = step_of(str(node.get("name", "")))
            if not name:
                continue
            if message.startswith(OOM):
                killed.append((name, _out_of_memory(name, message)))
            elif node.get("phase") in ACTIVE and message not in ("", *ROUTINE):
                if GATED in message:
                    message = _queue(cluster, node) or message
                waits.append((name, f"waits: {' '.join(message.split())}"))
    return [*killed, *waits]


def _out_of_memory(name: str, message: str) -> str:
    step = STEPS.get(name.replace("-", "_"))
    sized = step is not None and " " in step.resources.memory_limit
    hint = "; submit it with a larger size: -p size=medium or -p size=large" if sized else ""
    return f"its memory ran out: {message.partition(':')[0]}{hint}"


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
