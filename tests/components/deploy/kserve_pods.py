"""What KServe's controller makes and reports, for the stand-in: statuses as they were recorded from
OpenShift AI's KServe (fork of 2026-08-22) on Kubernetes 1.36, and pods and ReplicaSets like those
of that cluster.

``recorded/inferenceservice-status.jsonl`` has one line per change of an InferenceService, with the
case it belongs to: ``gen`` is metadata.generation and ``obs`` status.observedGeneration.
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
    """The recorded changes of a case, in their order."""
    rows = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["case"] == case]


def status(row: Object, generation: int, address: str, before: Object) -> Object:
    """A recorded row as a change of a status; ``generation`` is the Deployment's, ``before`` the
    status that it replaces (what the row lacks is removed)."""
    conditions = []
    for type, said in row["cond"].items():
        value, _, reason = said.partition(" ")
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
    """The metadata of the pods: labels and annotations of the InferenceService reach them."""
    meta = service["metadata"]
    annotations = {key: value for key, value in meta["annotations"].items() if key != objects.STOP}
    return {
        "labels": {**meta.get("labels", {}), LABEL: meta["name"]},
        "annotations": annotations,
    }


def revision(service: Object) -> str:
    """What the name of a ReplicaSet ends with: a digest of the pod template."""
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


def pod_status(does: str) -> Object:
    """The status of a pod that is ``ready``, ``starting``, ``crash``es, whose image is ``missing``,
    that is ``unschedulable``, or whose model is not where it is looked for (``no-model``)."""
    waits = {"waiting": {"reason": "PodInitializing"}}
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": "2026-11-30T10:00:00Z"}}
    crash = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed"}}
    image = {"waiting": {"reason": "ImagePullBackOff", "message": f'Back-off: "{NOT_FOUND}"'}}
    running = {"running": {"startedAt": "2026-11-30T10:00:00Z"}}
    states = {
        "ready": running, "starting": running, "crash": crash, "missing": image, "no-model": waits,
    }  # fmt: skip
    scheduled = {"type": "PodScheduled", "status": "True"}
    if does == "unschedulable":
        message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        scheduled |= {"status": "False", "reason": "Unschedulable", "message": message}
        return {"phase": "Pending", "conditions": [scheduled]}
    ready = does == "ready"
    server = _container("kserve-container", states[does], ready, ended if does == "crash" else {})
    first = {"terminated": {"exitCode": 0, "reason": "Completed"}}
    init = _container("storage-initializer", ended if does == "no-model" else first, not ready, {})
    return {
        "phase": "Pending" if does in ("missing", "no-model") else "Running",
        "conditions": [scheduled, {"type": "Ready", "status": str(ready)}],
        "initContainerStatuses": [init | {"ready": does != "no-model"}],
        "containerStatuses": [server, _container("kube-rbac-proxy", running, True, {})],
    }


def _container(name: str, state: Object, ready: bool, last: Object) -> Object:
    common = {"image": name, "imageID": name, "restartCount": 2 if last else 0}
    return {"name": name, "ready": ready, "state": state, "lastState": last, **common}
