"""A KubeRay RayJob as a plain object: ray.io/v1."""

import re
from typing import Any

from nudge.components.common.clients.kube import ResourceKind
from nudge.components.common.clients.pods import RESTRICTED
from nudge.components.common.core.environment import PART_LABEL
from nudge.components.common.core.errors import UserError
from nudge.components.train.cluster.jobs import (
    OWNED_LABEL,
    RUN_LABEL,
    Stage,
    Step,
    environment,
    job_object,
    longest_run_s,
    pod_spec,
    resources,
)
from nudge.components.train.cluster.worker import PERMANENT
from nudge.components.train.settings import LaunchSettings

KIND = ResourceKind(
    "ray.io/v1",
    "RayJob",
    "rayjobs",
    needs="KubeRay (on OpenShift AI: component `ray` of the DataScienceCluster)",
)
SUBMITTER = "ray-job-submitter"
LOG = ({PART_LABEL: "submitter"}, SUBMITTER)
"""The submitter follows the driver's log, which includes those of the workers."""

SMALL = {"cpu": "1", "memory": "1Gi"}
"""The resource request of the submitter, which runs `ray job submit` and `ray job logs`."""

GONE_AFTER_S = 60
"""How long its pods stay after the end, so that their logs and events can be read."""

RAY_VERSION = "2.60.0"
"""The Ray of our images. KubeRay adds probes that need `wget` if the version is not set or below
2.53."""

DASHBOARD_PORT, AGENT_PORT = 8265, 52365
GCS_HEALTH, RAYLET_HEALTH = "/api/gcs_healthz", "/api/local_raylet_healthz"
"""Endpoints of the dashboard on the head and of the dashboard agent on each node; both need
`ray[default]`."""

EXIT_CODE = re.compile(r"failed with exit code (\d+)")

WORKER = re.compile(r"(?:\x1b\[[\d;]*m)?\(\w+ pid=[^)]*\)(?:\x1b\[[\d;]*m)? ?")
"""The prefix that Ray adds to a worker's line: ``(RayTrainWorker pid=7, ip=10.0.0.1) ``."""

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
    handover: str,
    schema: dict[str, Any],
    step: Step,
) -> dict[str, Any]:
    """The object: a head without a GPU, one worker pod per node, one driver.

    It never restarts the driver. A retry of the step makes a new RayJob, which resumes from the
    newest checkpoint.
    """
    variables = environment(settings, step)
    size = {"cpu": settings.head_cpu, "memory": settings.head_memory}
    head = _pod(settings, step, name, "head", "ray-head", size, variables)
    head["spec"]["containers"][0] |= _probes(DASHBOARD_PORT, GCS_HEALTH)
    worker = _pod(settings, step, name, "worker", "ray-worker", resources(settings), variables)
    worker["spec"]["containers"][0] |= _probes(AGENT_PORT, RAYLET_HEALTH)
    workers = {
        "groupName": "workers",
        "replicas": settings.nodes,
        "minReplicas": settings.nodes,
        "maxReplicas": settings.nodes,
        "rayStartParams": {"num-gpus": str(settings.gpus_per_node)},
        "template": worker,
    }
    submitter = _pod(settings, step, name, "submitter", SUBMITTER, SMALL, [])
    submitter["spec"]["restartPolicy"] = "Never"
    spec = {
        "entrypoint": f"python -P -m nudge.components.train.cluster.ray_driver {handover}",
        "shutdownAfterJobFinishes": True,  # Kueue requires it
        "ttlSecondsAfterFinished": GONE_AFTER_S,
        "activeDeadlineSeconds": longest_run_s(settings),
        "backoffLimit": 0,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter,
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            # A head that offers no CPUs and GPUs gets no rank.
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                "template": head,
            },
            "workerGroupSpecs": [workers],
        },
    }
    known = schema["properties"]["spec"]["properties"]
    # Older releases have neither activeDeadlineSeconds nor backoffLimit.
    spec = {key: value for key, value in spec.items() if key in known}
    return job_object(KIND, settings, name, step, spec)


def pods(name: str) -> dict[str, str]:
    """Labels of all pods of the job of this name."""
    return {RUN_LABEL: name}


def stage(job: dict[str, Any]) -> Stage:
    """The stage that KubeRay reports."""
    status = job.get("status") or {}
    found = STAGES.get(status.get("jobDeploymentStatus", ""), "starting")
    if found == "complete" and status.get("jobStatus") != "SUCCEEDED":
        return "failed"  # older releases call a job complete however it ended
    if found == "starting" and (job.get("spec") or {}).get("suspend"):
        return "suspended"
    return found


def describe_status(job: dict[str, Any]) -> str:
    """The status that KubeRay reports, in one line, without the log in its message."""
    status = job.get("status") or {}
    names = ("jobDeploymentStatus", "jobStatus", "reason", "message")
    found = [str(status[name]) for name in names if status.get(name)]
    if found and status.get("message"):
        found[-1] = found[-1].partition(", last available logs")[0]
    return " ".join(found) or "its controller has not reported a status yet"


def refusal(job: dict[str, Any]) -> UserError | None:
    """The driver's own error, from the log's end in the job's status; None if a retry may help."""
    message = str((job.get("status") or {}).get("message") or "")
    code = EXIT_CODE.search(message)
    if code is None or int(code[1]) not in PERMANENT:
        return None
    sentences = [line for line in message.splitlines() if line.startswith("error: ")]
    text = sentences[-1].removeprefix("error: ") if sentences else code.string.splitlines()[0]
    return PERMANENT[int(code[1])](text)


def started_with(job: dict[str, Any]) -> Any:
    """The part of a job, besides its name, that belongs to one run only."""
    return job["spec"].get("entrypoint")


def plain(line: str) -> str:
    """A line of the log without Ray's prefix."""
    return WORKER.sub("", line, count=1)


def _probes(ready_port: int, ready_path: str) -> dict[str, Any]:
    """Probes of a Ray container: started and alive while its raylet is, ready by another endpoint.

    KubeRay adds probes only to a container that has none.
    """
    raylet = {"httpGet": {"port": AGENT_PORT, "path": RAYLET_HEALTH}, "timeoutSeconds": 5}
    ready = {"httpGet": {"port": ready_port, "path": ready_path}, "timeoutSeconds": 5}
    return {
        "startupProbe": {**raylet, "periodSeconds": 5, "failureThreshold": 120},
        "readinessProbe": {**ready, "periodSeconds": 5, "failureThreshold": 10},
        "livenessProbe": {**raylet, "periodSeconds": 10, "failureThreshold": 30},
    }


def _pod(
    settings: LaunchSettings,
    step: Step,
    name: str,
    part: str,
    container: str,
    needed: dict[str, str],
    variables: list[dict[str, Any]],
) -> dict[str, Any]:
    here = {
        "name": container,
        "image": step.image,
        "env": variables,
        "resources": {"requests": needed, "limits": needed},
        "securityContext": RESTRICTED,
    }
    spec = pod_spec(settings, step, container)
    (mounted,) = spec.pop("containers", [{}])
    labels = {**OWNED_LABEL, RUN_LABEL: name, PART_LABEL: part}
    return {"metadata": {"labels": labels}, "spec": {**spec, "containers": [{**mounted, **here}]}}
