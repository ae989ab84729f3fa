"""What the stand-in for KServe's controller creates and reports: statuses recorded from OpenShift
AI's KServe (fork of 2026-08-22) on Kubernetes 1.36, and pods and ReplicaSets like those of that
cluster.

``recorded/inferenceservice-status.jsonl`` has one line per change of an InferenceService: ``gen``
is metadata.generation and ``obs`` status.observedGeneration. Each line's ``case`` was added here.
The recording does not say why the pods of `update-stuck` and `update-stuck-later` did not become
ready; that the second had an image that could not be pulled is a guess. Neither is recorded for an
update whose pods cannot be scheduled or created, which plays `update-stuck` too.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from nudge.components.deploy.kserve import objects as objects

Object = dict[str, Any]
RECORDED = Path(__file__).parent / "recorded" / "inferenceservice-status.jsonl"
LABEL = "serving.kserve.io/inferenceservice"

NOT_FOUND = "no match for platform in manifest: not found"
CRASH_LOG = "ValueError: The model's max seq len (8192) is larger than the KV cache can hold"


@functools.cache
def recorded(case: str) -> list[Object]:
    """The recorded changes of a case, in order."""
    rows = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["case"] == case]


def status(row: Object, generation: int, address: str, before: Object) -> Object:
    """A recorded row as a status change; ``generation`` is the Deployment's, ``before`` the status
    that it replaces (fields that the row lacks are removed)."""
    conditions = []
    for type, text in row["cond"].items():
        value, _, reason = text.partition(" ")
        conditions.append({"type": type, "status": value, **({"reason": reason} if reason else {})})
    model = row["model"]
    if model is not None:
        model = {**dict.fromkeys((before.get("modelStatus") or {}).keys()), **model}
    return {
        "conditions": conditions,
        "modelStatus": model,
        "observedGeneration": generation if row["obs"] else None,
        "url": f"http://{address}" if row["url"] else None,
    }


def template(service: Object) -> Object:
    """The metadata of the pods, with the InferenceService's labels and annotations."""
    meta = service["metadata"]
    annotations = {key: value for key, value in meta["annotations"].items() if key != objects.STOP}
    return {
        "labels": {**meta.get("labels", {}), LABEL: meta["name"]},
        "annotations": annotations,
    }


def revision(service: Object) -> str:
    """The end of a ReplicaSet's name: a digest of the pod template."""
    predictor = {
        key: value
        for key, value in service["spec"]["predictor"].items()
        if key not in ("minReplicas", "maxReplicas")
    }
    text = json.dumps([template(service), predictor], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:9]


def replica_set(service: Object) -> Object:
    meta = service["metadata"]
    made = template(service)
    owner = {
        "apiVersion": service["apiVersion"],
        "kind": service["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": f"{meta['name']}-predictor-{revision(service)}",
            **made,
            "ownerReferences": [owner],
        },
        "spec": {
            "replicas": replicas(service),
            "selector": {"matchLabels": {LABEL: meta["name"]}},
            "template": {
                "metadata": made,
                "spec": {"containers": [{"name": "kserve-container", "image": "vllm"}]},
            },
        },
    }


def replicas(service: Object) -> int:
    return max(1, int(service["spec"]["predictor"].get("minReplicas") or 1))


def pod(owner: Object, number: int) -> Object:
    meta = owner["metadata"]
    named = {key: meta[key] for key in ("name", "uid")}
    containers = [{"name": name, "image": name} for name in ("kserve-container", "kube-rbac-proxy")]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{meta['name']}-{number}",
            **owner["spec"]["template"]["metadata"],
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", **named}],
        },
        "spec": {"containers": containers},
    }


def pod_status(fate: str) -> Object:
    """The status of a pod with this fate: ``ready``, ``starting``, ``crash``, ``missing`` (its
    image), ``unschedulable``, or ``no-model`` (its model is not at its URI)."""
    waits = {"waiting": {"reason": "PodInitializing"}}
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": "2026-11-30T10:00:00Z"}}
    crash = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed"}}
    image = {"waiting": {"reason": "ImagePullBackOff", "message": f'Back-off: "{NOT_FOUND}"'}}
    running = {"running": {"startedAt": "2026-11-30T10:00:00Z"}}
    states = {
        "ready": running, "starting": running, "crash": crash, "missing": image, "no-model": waits,
    }  # fmt: skip
    scheduled = {"type": "PodScheduled", "status": "True"}
    if fate == "unschedulable":
        message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        scheduled |= {"status": "False", "reason": "Unschedulable", "message": message}
        return {"phase": "Pending", "conditions": [scheduled]}
    ready = fate == "ready"
    server = _container("kserve-container", states[fate], ready, ended if fate == "crash" else {})
    first = {"terminated": {"exitCode": 0, "reason": "Completed"}}
    init = _container("storage-initializer", ended if fate == "no-model" else first, not ready, {})
    return {
        "phase": "Pending" if fate in ("missing", "no-model") else "Running",
        "conditions": [scheduled, {"type": "Ready", "status": str(ready)}],
        "initContainerStatuses": [init | {"ready": fate != "no-model"}],
        "containerStatuses": [server, _container("kube-rbac-proxy", running, True, {})],
    }


def _container(name: str, state: Object, ready: bool, last: Object) -> Object:
    common = {"image": name, "imageID": name, "restartCount": 2 if last else 0}
    return {"name": name, "ready": ready, "state": state, "lastState": last, **common}
