"""What the jobs of the cluster have in common, whichever engine runs them."""

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
from nudge.components.train.settings import LaunchSettings

PRIORITY = "kueue.x-k8s.io/priority-class"
CONNECTION_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT")
OPTIONAL_KEYS = ("AWS_S3_BUCKET", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "HF_TOKEN")
PASSED_ON = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Variables of a step's pod that its job's pods get as they are: the ConfigMap of settings and the
pipelines server give them to steps alone. (The registry is asked by the step.)"""

TRUSTED = "/etc/nudge/trusted"
"""Where a job's pods have the bundle of certificate authorities that the step's pod has."""

TRUST_VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""What Kubeflow Pipelines' launcher sets to that bundle in a step."""

Stage = Literal["suspended", "starting", "running", "complete", "failed"]


@dataclass(frozen=True)
class Step:
    """What a job takes over from the step that launches it."""

    image: str
    owner: dict[str, Any] | None = None
    """A reference to the step's pod."""
    variables: dict[str, str] = field(default_factory=dict)
    trusted: dict[str, Any] | None = None
    """The source of a volume that holds a bundle of certificate authorities, ``ca.crt``."""


class Engine(Protocol):
    """What the launcher asks of `trainjob` and `rayjob`, each a module."""

    KIND: ResourceKind
    LOG: tuple[dict[str, str], str]
    """The pod and the container whose log is followed: labels besides the run's, and a name."""

    def body(
        self,
        settings: LaunchSettings,
        *,
        name: str,
        exchange: str,
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
        """What its controller says of it, in one line."""
        ...

    def started_with(self, job: dict[str, Any]) -> Any:
        """What makes a job that of a run besides its name."""
        ...

    def plain(self, line: str) -> str:
        """A line of the log as the training wrote it."""
        ...


def job_name(run_id: str) -> str:
    """A name that a retry of the same run finds again, and no other run has."""
    stem = re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")[:24].strip("-") or "run"
    return f"nudge-{stem}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


def labels_of(settings: LaunchSettings, name: str) -> dict[str, str]:
    """The labels of a job: whose it is, and what Kueue goes by."""
    labels = {**OWNED_LABEL, RUN_LABEL: name}
    if settings.queue:
        labels[QUEUE] = settings.queue
    if settings.priority_class:
        labels[PRIORITY] = settings.priority_class
    return labels


def longest_run_s(settings: LaunchSettings) -> int:
    """What the job's own controller lets it run, should no step be left to end it: no part of its
    life can be longer than the whole, whose end the launcher watches."""
    return max(1, math.ceil(settings.deadline_hours * 3600))


def seconds_left(job: dict[str, Any], settings: LaunchSettings) -> float:
    """Until the deadline of a job; less than 0 after it."""
    created = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    age = datetime.now(UTC) - created
    return settings.deadline_hours * 3600 - age.total_seconds()


def resources(settings: LaunchSettings) -> dict[str, str]:
    """What a node of the job asks for."""
    asked = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.gpus_per_node:
        asked[settings.gpu_resource] = str(settings.gpus_per_node)
    return asked


def environment(settings: LaunchSettings, step: Step) -> list[dict[str, Any]]:
    """The step's variables, and those of the object store from the connection's Secret."""
    # Python must not import a module from the pod's working directory.
    given = {**step.variables, "PYTHONSAFEPATH": "1"}
    if step.trusted:
        given |= dict.fromkeys(TRUST_VARIABLES, f"{TRUSTED}/ca.crt")
    plain = [{"name": name, "value": value} for name, value in given.items()]
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
    """Where a pod runs, and the volumes in its container; empty where nothing is asked."""
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
