"""Recorded statuses of TrainJobs, RayJobs and Kueue's Workloads (Trainer, KubeRay and Kueue of
2026-08 on Kubernetes 1.36), and pods like those of that cluster.

Each line of ``recorded/jobs-*.watch`` is one change: the time, the object's name, and its
spec.suspend, deletion, finalizers and status.
"""

import json
from pathlib import Path
from typing import Any

from tests.kubernetes_api import KubernetesApi

Object = dict[str, Any]
RECORDED = Path(__file__).parent / "recorded"


def changes(kind: str, name: str) -> list[Object]:
    """The statuses of an object, in order; ``kind`` is trainjobs, rayjobs or workloads."""
    found = []
    for line in (RECORDED / f"jobs-{kind}.watch").read_text(encoding="utf-8").splitlines():
        _, recorded, text = line.split(" ", 2)
        if recorded == name:
            found.append(json.loads(text)["status"] or {})
    return found


def reason_of(status: Object, type: str = "QuotaReserved") -> str:
    """The reason of a condition, or an empty string."""
    found = [each["reason"] for each in status.get("conditions", []) if each["type"] == type]
    return str(found[0]) if found else ""


def set_recorded(api: KubernetesApi, body: Object, status: Object) -> None:
    """Replace an object's status by a recorded one."""
    current = api.find(body["kind"], body["metadata"]["name"]) or body
    api.set_status(body, **{**dict.fromkeys(current.get("status") or {}), **status})


def add_workload(
    api: KubernetesApi, job: Object, status: Object, *, version: str = "v1beta2", queue: str = ""
) -> Object:
    """A Workload that Kueue makes for a job."""
    meta = job["metadata"]
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": meta["name"]}
    body = {
        "apiVersion": f"kueue.x-k8s.io/{version}",
        "kind": "Workload",
        "metadata": {
            "name": f"{job['kind'].lower()}-{meta['name']}-d27f3",
            "ownerReferences": [{**owner, "uid": meta["uid"], "controller": True}],
        },
        "spec": {"queueName": queue or "default"},
    }
    return api.add(body, **status)


def add_pod(
    api: KubernetesApi, name: str, labels: dict[str, str], container: str, **status: Any
) -> Object:
    """A pod of a job. Its owner is a Job or a RayCluster, as on a cluster, not the job itself."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "of-the-job"}
    meta = {"name": name, "labels": labels, "ownerReferences": [owner]}
    spec = {"containers": [{"name": container, "image": "i"}]}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
    return api.add(body, **status)


def container_status(name: str, restarts: int = 0, **states: Any) -> Object:
    """The status of one container: ``state`` and ``lastState``."""
    common = {"image": "i", "imageID": "", "ready": False, "restartCount": restarts}
    return {"name": name, **common, **states}


def terminated(code: int, reason: str = "Error", message: str = "") -> Object:
    """The state of a container that ended."""
    end = {"exitCode": code, "reason": reason, "finishedAt": "2026-11-30T10:00:00Z"}
    return {"terminated": {**end, **({"message": message} if message else {})}}
