"""A KubeRay RayJob as a plain object: ray.io/v1."""

import re
from typing import Any

from nudge.components.common.clients.kube import ResourceKind
from nudge.components.common.clients.pods import RESTRICTED
from nudge.components.common.core.environment import PART_LABEL
from nudge.components.train.cluster.jobs import (
    OWNED_LABEL,
    RUN_LABEL,
    Stage,
    Step,
    environment,
    labels_of,
    longest_run_s,
    pod_spec,
    resources,
)
from nudge.components.train.settings import LaunchSettings

KIND = ResourceKind(
    "ray.io/v1",
    "RayJob",
    "rayjobs",
    needs="KubeRay (on OpenShift AI: component `ray` of the DataScienceCluster)",
)
SUBMITTER = "ray-job-submitter"
LOG = ({PART_LABEL: "submitter"}, SUBMITTER)
"""The submitter follows the driver's log, which holds those of the workers."""

HEAD = {"cpu": "2", "memory": "8Gi"}
"""The driver and Ray's own services; Ray's guide to large clusters starts there."""
SMALL = {"cpu": "1", "memory": "1Gi"}

GONE_AFTER_S = 60
"""Its pods stay so long after the end, for their logs and events to be read."""

WORKER = re.compile(r"(?:\x1b\[[\d;]*m)?\(\w+ pid=[^)]*\)(?:\x1b\[[\d;]*m)? ?")
"""What Ray puts before a worker's line: ``(RayTrainWorker pid=7, ip=10.0.0.1) ``."""

STAGES: dict[str, Stage] = {
    "Complete": "complete",
    "Failed": "failed",
    "ValidationFailed": "failed",
    "Running": "running",
    "Initializing": "starting",
    "Waiting": "starting",
    "Retrying": "starting",
    "Suspending": "suspended",
    "Suspended": "suspended",
}


def body(
    settings: LaunchSettings,
    *,
    name: str,
    exchange: str,
    schema: dict[str, Any],
    step: Step,
) -> dict[str, Any]:
    """The object: a head without a GPU, a worker pod for each node, one driver.

    Nothing is tried again within it: the step, tried again, makes a new one, which goes on from the
    newest checkpoint.
    """
    variables = environment(settings, step)
    head = _pod(settings, step, name, "head", "ray-head", HEAD, variables)
    workers = {
        "groupName": "workers",
        "replicas": settings.nodes,
        "minReplicas": settings.nodes,
        "maxReplicas": settings.nodes,
        "rayStartParams": {"num-gpus": str(settings.gpus_per_node)},
        "template": _pod(
            settings, step, name, "worker", "ray-worker", resources(settings), variables
        ),
    }
    submitter = _pod(settings, step, name, "submitter", SUBMITTER, SMALL, [])
    submitter["spec"]["restartPolicy"] = "Never"
    metadata: dict[str, Any] = {"name": name, "labels": labels_of(settings, name)}
    if step.owner:
        metadata["ownerReferences"] = [step.owner]
    spec = {
        "entrypoint": f"python -P -m nudge.components.train.cluster.ray_driver {exchange}",
        "shutdownAfterJobFinishes": True,  # Kueue takes no other
        "ttlSecondsAfterFinished": GONE_AFTER_S,
        "activeDeadlineSeconds": longest_run_s(settings),
        "backoffLimit": 0,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter,
        "rayClusterSpec": {
            # Without CPUs and GPUs to give, the head gets no rank.
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                "template": head,
            },
            "workerGroupSpecs": [workers],
        },
    }
    known = schema["properties"]["spec"]["properties"]
    return {
        "apiVersion": KIND.api_version,
        "kind": KIND.name,
        "metadata": metadata,
        # Older releases know neither a deadline nor a limit of attempts.
        "spec": {key: value for key, value in spec.items() if key in known},
    }


def pods(name: str) -> dict[str, str]:
    """Labels of all pods of the job of this name."""
    return {RUN_LABEL: name}


def stage(job: dict[str, Any]) -> Stage:
    """Where the job stands, by what KubeRay says of it."""
    status = job.get("status") or {}
    found = STAGES.get(status.get("jobDeploymentStatus", ""), "starting")
    if found == "complete" and status.get("jobStatus") != "SUCCEEDED":
        return "failed"  # KubeRay calls what has ended complete, however it ended
    if found == "starting" and (job.get("spec") or {}).get("suspend"):
        return "suspended"
    return found


def describe_status(job: dict[str, Any]) -> str:
    """What KubeRay says of the job, in one line."""
    status = job.get("status") or {}
    names = ("jobDeploymentStatus", "jobStatus", "reason", "message")
    return " ".join(str(status[name]) for name in names if status.get(name)) or (
        "its controller has not said anything of it"
    )


def started_with(job: dict[str, Any]) -> Any:
    """What makes a job that of a run besides its name."""
    return job["spec"].get("entrypoint")


def plain(line: str) -> str:
    """A line of the log without what Ray puts before it."""
    return WORKER.sub("", line, count=1)


def _pod(
    settings: LaunchSettings,
    step: Step,
    name: str,
    part: str,
    container: str,
    asked: dict[str, str],
    variables: list[dict[str, Any]],
) -> dict[str, Any]:
    here = {
        "name": container,
        "image": step.image,
        "env": variables,
        "resources": {"requests": asked, "limits": asked},
        "securityContext": RESTRICTED,
    }
    spec = pod_spec(settings, step, container)
    (mounted,) = spec.pop("containers", [{}])
    labels = {**OWNED_LABEL, RUN_LABEL: name, PART_LABEL: part}
    return {"metadata": {"labels": labels}, "spec": {**spec, "containers": [{**mounted, **here}]}}
