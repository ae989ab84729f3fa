"""What TrainJobs and RayJobs have in common."""

import hashlib
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from nudge.components.common.clients.kube import ResourceKind
from nudge.components.common.clients.pods import QUEUE
from nudge.components.common.core.environment import OWNED_LABEL as OWNED_LABEL
from nudge.components.common.core.environment import RUN_LABEL as RUN_LABEL
from nudge.components.common.core.errors import UserError
from nudge.components.train.settings import LaunchSettings

PRIORITY = "kueue.x-k8s.io/priority-class"
CONNECTION_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT")
OPTIONAL_KEYS = ("AWS_S3_BUCKET", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "HF_TOKEN")
PASSED_ON = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Variables of a step's pod that are copied to its job's pods: the ConfigMap of settings and the
pipelines server set them in steps only. (Only the step talks to the registry.)"""

TRUSTED = "/etc/nudge/trusted"
"""The folder in which a job's pods mount the step's bundle of certificate authorities."""

TRUST_VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""The variables that Kubeflow Pipelines' launcher points at that bundle in a step."""

Stage = Literal["suspended", "starting", "running", "complete", "failed"]


@dataclass(frozen=True)
class Step:
    """What a job inherits from the step that launches it."""

    image: str
    owner: dict[str, Any] | None = None
    """A reference to the step's pod."""
    variables: dict[str, str] = field(default_factory=dict)
    trusted: dict[str, Any] | None = None
    """The source of a volume that holds a bundle of certificate authorities, ``ca.crt``."""


class Engine(Protocol):
    """What the launcher needs from `trainjob` and `rayjob`, which are modules."""

    KIND: ResourceKind
    LOG: tuple[dict[str, str], str]
    """The pod and the container whose log is followed: further labels of the pod, and a name."""

    def body(
        self,
        settings: LaunchSettings,
        *,
        name: str,
        handover: str,
        schema: dict[str, Any],
        step: Step,
    ) -> dict[str, Any]:
        """The job for a cluster that has this ``schema`` of its kind."""
        ...

    def pods(self, name: str) -> dict[str, str]:
        """Labels of all pods of the job of this name."""
        ...

    def stage(self, job: dict[str, Any]) -> Stage: ...

    def describe_status(self, job: dict[str, Any]) -> str:
        """The status that its controller reports, in one line."""
        ...

    def refusal(self, job: dict[str, Any]) -> UserError | None:
        """The training's own error, if the job's status has one that a retry would repeat."""
        ...

    def started_with(self, job: dict[str, Any]) -> Any:
        """The part of a job, besides its name, that belongs to one run only."""
        ...

    def plain(self, line: str) -> str:
        """A line of the log as the training wrote it."""
        ...


def job_name(run_id: str) -> str:
    """The job's name: the same in each retry of a run, and of no other run."""
    stem = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")[:24].strip("-") or "run"
    return f"nudge-{stem}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def labels_of(settings: LaunchSettings, name: str) -> dict[str, str]:
    """The labels of a job: its owner, and its queue and priority in Kueue."""
    labels = {**OWNED_LABEL, RUN_LABEL: name}
    if settings.queue:
        labels[QUEUE] = settings.queue
    if settings.priority_class:
        labels[PRIORITY] = settings.priority_class
    return labels


def job_object(
    kind: ResourceKind,
    settings: LaunchSettings,
    name: str,
    step: Step,
    spec: dict[str, Any],
    annotations: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The job as an object; the step's pod owns it, if it runs in one."""
    metadata: dict[str, Any] = {"name": name, "labels": labels_of(settings, name)}
    if annotations:
        metadata["annotations"] = annotations
    if step.owner:
        metadata["ownerReferences"] = [step.owner]
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": metadata,
        "spec": spec,
    }


def longest_run_s(settings: LaunchSettings) -> int:
    """The job's own limit, in seconds, for when no step is left to end it. The launcher enforces
    the deadline itself; that one also counts time in the queue."""
    return max(1, math.ceil(settings.deadline_hours * 3600))


def seconds_left(job: dict[str, Any], settings: LaunchSettings) -> float:
    """Seconds until the deadline of a job; negative after it."""
    created = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    age = datetime.now(UTC) - created
    return settings.deadline_hours * 3600 - age.total_seconds()


def resources(settings: LaunchSettings) -> dict[str, str]:
    """The resource request of one node of the job."""
    needed = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.gpus_per_node:
        needed[settings.gpu_resource] = str(settings.gpus_per_node)
    return needed


def environment(settings: LaunchSettings, step: Step) -> list[dict[str, Any]]:
    """The step's variables, and those of the object store from the connection's Secret."""
    # Python must not import a module from the pod's working directory.
    variables = {**step.variables, "PYTHONSAFEPATH": "1"}
    if step.trusted:
        variables |= dict.fromkeys(TRUST_VARIABLES, f"{TRUSTED}/ca.crt")
    plain = [{"name": name, "value": value} for name, value in variables.items()]
    if not settings.connection:
        return plain
    return plain + [
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


def pod_spec(settings: LaunchSettings, step: Step, container: str) -> dict[str, Any]:
    """The nodes a pod may run on, and the volumes of its container; empty without such settings."""
    spec: dict[str, Any] = {}
    if settings.tolerations:
        spec["tolerations"] = settings.tolerations
    if settings.node_selector:
        spec["nodeSelector"] = settings.node_selector
    volumes: dict[str, tuple[str, dict[str, Any]]] = {}
    if settings.volume_claim:
        claim = {"persistentVolumeClaim": {"claimName": settings.volume_claim}}
        volumes["shared"] = (settings.volume_path, claim)
    if step.trusted:
        volumes["trusted"] = (TRUSTED, step.trusted)
    if volumes:
        spec["volumes"] = [{"name": name, **source} for name, (_, source) in volumes.items()]
        mounts = [{"name": name, "mountPath": path} for name, (path, _) in volumes.items()]
        spec["containers"] = [{"name": container, "volumeMounts": mounts}]
    return spec
