"""A Kubeflow TrainJob as a plain object: trainer.kubeflow.org/v1alpha1."""

import hashlib
import re
from typing import Any

from nudge.components.common.kube import Kind
from nudge.components.train.settings import LaunchSettings

TRAIN_JOB = Kind(
    "trainer.kubeflow.org/v1alpha1",
    "TrainJob",
    "trainjobs",
    needs="Kubeflow Trainer (on OpenShift AI: component `trainer` of the DataScienceCluster)",
)
QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
RUN_LABEL = "nudge/run"
OWNED_LABEL = {"app.kubernetes.io/managed-by": "nudge"}
PATCH_MANAGER = "nudge.io/launcher"
POD_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""What the pods of a TrainJob carry: the JobSet has the job's name."""

CONTAINER = "node"
CONNECTION_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT")
OPTIONAL_KEYS = ("AWS_S3_BUCKET", "AWS_DEFAULT_REGION", "HF_TOKEN")


def job_name(run_id: str) -> str:
    """A name that a retry of the same run finds again, and no other run has."""
    stem = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")[:24].strip("-") or "run"
    return f"nudge-{stem}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def train_job(
    settings: LaunchSettings,
    *,
    name: str,
    exchange: str,
    image: str,
    schema: dict[str, Any],
    owner: dict[str, Any] | None,
) -> dict[str, Any]:
    """The object, for a cluster whose TrainJob has this ``schema``.

    Newer releases take what the pods need besides as ``runtimePatches``, older ones as
    ``podTemplateOverrides``; a deadline of the job's own only the newer ones know.
    """
    known = schema["properties"]["spec"]["properties"]
    labels = {**OWNED_LABEL, RUN_LABEL: name}
    if settings.queue:
        labels[QUEUE] = settings.queue
    if settings.priority_class:
        labels[PRIORITY] = settings.priority_class
    resources = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.gpus_per_node:
        resources[settings.gpu_resource] = str(settings.gpus_per_node)
    trainer: dict[str, Any] = {
        "image": image,
        "command": ["python", "-m", "nudge.components.train.worker"],
        "args": [exchange],
        "env": _environment(settings),
        "numNodes": settings.nodes,
        "resourcesPerNode": {"requests": resources, "limits": resources},
    }
    # It was an int-or-string ("auto", "gpu") in older releases and is a number in newer ones.
    trainer["numProcPerNode"] = max(1, settings.gpus_per_node)
    spec: dict[str, Any] = {
        "runtimeRef": {"name": settings.runtime, "kind": settings.runtime_kind},
        "trainer": trainer,
    }
    if "activeDeadlineSeconds" in known:
        spec["activeDeadlineSeconds"] = int(settings.deadline_hours * 3600)
    if pods := _pods(settings):
        if "runtimePatches" in known:
            template = {"template": {"spec": {"template": {"spec": pods}}}}
            replicated = [{"name": CONTAINER, **template}]
            patch = {"template": {"spec": {"replicatedJobs": replicated}}}
            spec["runtimePatches"] = [{"manager": PATCH_MANAGER, "trainingRuntimeSpec": patch}]
        else:
            spec["podTemplateOverrides"] = [{"targetJobs": [{"name": CONTAINER}], "spec": pods}]
    metadata: dict[str, Any] = {"name": name, "labels": labels}
    if owner:
        metadata["ownerReferences"] = [owner]
    return {
        "apiVersion": TRAIN_JOB.api_version,
        "kind": TRAIN_JOB.name,
        "metadata": metadata,
        "spec": spec,
    }


def _environment(settings: LaunchSettings) -> list[dict[str, Any]]:
    if not settings.connection:
        return []
    return [
        {
            "name": key,
            "valueFrom": {
                "secretKeyRef": {
                    "name": settings.connection,
                    "key": key,
                    "optional": key in OPTIONAL_KEYS,
                }
            },
        }
        for key in (*CONNECTION_KEYS, *OPTIONAL_KEYS)
    ]


def _pods(settings: LaunchSettings) -> dict[str, Any]:
    """What the pods have besides the trainer's fields: where they run, and the shared volume."""
    pods: dict[str, Any] = {}
    if settings.tolerations:
        pods["tolerations"] = settings.tolerations
    if settings.node_selector:
        pods["nodeSelector"] = settings.node_selector
    if settings.volume_claim:
        claim = {"claimName": settings.volume_claim}
        mount = {"name": "shared", "mountPath": settings.volume_path}
        pods["volumes"] = [{"name": "shared", "persistentVolumeClaim": claim}]
        pods["containers"] = [{"name": CONTAINER, "volumeMounts": [mount]}]
    return pods
