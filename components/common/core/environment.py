"""Facts about the environment: variables, files that Kubernetes mounts, labels, the home folder.

Each name is spelled here once. Nothing but the standard library is imported, so that `nudge --help`
stays fast and `nudge doctor` works where no extra is installed.
"""

import contextlib
import math
import os
from pathlib import Path

HOME = "NUDGE_HOME"
"""The folder in which nudge keeps its state."""

RUN_ID, RECIPE, EVENTS = "NUDGE_RUN_ID", "NUDGE_RECIPE", "NUDGE_EVENTS"
"""What `nudge run` passes to its steps: the run's id, the recipe's name, the file of events."""

REUSE, CHECKPOINTS = "NUDGE_REUSE", "NUDGE_CHECKPOINTS"
"""Where finished steps and checkpoints are kept; without REUSE every step runs."""

EMBEDDED = "NUDGE_EMBEDDED"
"""The embedded services that a run uses, separated by commas."""

REGISTRY_URL, REGISTRY_CA = "NUDGE_REGISTRY_URL", "NUDGE_REGISTRY_CA"
REGISTRY_TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"
"""The file of the registry's token; the model-registry client reads the same variable."""

S3_ENDPOINT, S3_BUCKET, S3_REGION = "AWS_S3_ENDPOINT", "AWS_S3_BUCKET", "AWS_DEFAULT_REGION"
S3_ACCESS_KEY, S3_SECRET_KEY = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
CONNECTION = (S3_ENDPOINT, S3_ACCESS_KEY, S3_SECRET_KEY, S3_BUCKET)
"""The variables of a complete S3 data connection."""

PIPELINES_URL, PIPELINES_TOKEN = "NUDGE_PIPELINES_URL", "NUDGE_PIPELINES_TOKEN"
PIPELINES_CA, DASHBOARD_URL = "NUDGE_PIPELINES_CA", "NUDGE_DASHBOARD_URL"
NAMESPACE = "NUDGE_NAMESPACE"

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""The names of this machine for itself."""

KUBERNETES = "KUBERNETES_SERVICE_HOST"
"""Kubernetes sets it in every container."""

POD_NAME, RETRY_INDEX = "KFP_POD_NAME", "KFP_RETRY_INDEX"
"""Kubeflow Pipelines sets these in a step's container; servers before 2026 omit the last one."""

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""The folder with the token, namespace and CA certificates of a pod's service account."""

TERMINATION_LOG, TERMINATION_BYTES = Path("/dev/termination-log"), 4096
"""Where a container writes why it ended, and how many bytes of that the kubelet keeps."""

PIPELINE_RUN_LABEL = "pipeline/runid"
"""The pipelines server labels each Workflow and pod of a run with its id."""

WORKFLOW_LABEL = "workflows.argoproj.io/workflow"
NODE_ANNOTATION = "workflows.argoproj.io/node-name"
RUN_LABEL, PART_LABEL = "nudge/run", "nudge/part"
OWNED_LABEL = {"app.kubernetes.io/managed-by": "nudge"}
CONTAINER_LABEL = "nudge.run"
"""The Docker label of a run's containers on this machine."""


def bypass_proxy_here() -> None:
    """Keep requests to this machine away from the proxies of the environment, in this process and
    in those that it starts."""
    if not any(os.environ.get(name) for name in PROXIES):
        return
    for name in ("NO_PROXY", "no_proxy"):
        named = [each.strip() for each in os.environ.get(name, "").split(",") if each.strip()]
        if "*" not in named:
            os.environ[name] = ",".join(dict.fromkeys([*named, *LOOPBACK]))


def in_pod() -> bool:
    """Whether this process runs in a container of a Kubernetes pod."""
    return bool(os.environ.get(KUBERNETES))


def in_pipeline_step() -> bool:
    """Whether this process is a step of a pipeline on a cluster."""
    return bool(os.environ.get(POD_NAME))


def nudge_home() -> Path:
    """The folder where nudge keeps its state: NUDGE_HOME, or ``.nudge`` in the current folder."""
    return Path(os.environ.get(HOME, ".nudge")).resolve()


def usable_cores() -> int:
    """The cores that this process may use: by its affinity, and by the CPU limit of its container
    (cgroup v2), which a pod on a large node has."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))  # "max": no number, no limit
    return cores
