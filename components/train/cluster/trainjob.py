"""A Kubeflow TrainJob as a plain object: trainer.kubeflow.org/v1alpha1."""

from typing import Any

from nudge.components.common.clients.kube import ResourceKind, condition, describe
from nudge.components.common.clients.pods import RESTRICTED
from nudge.components.train.cluster.job_status import PORT, PORT_VARIABLE
from nudge.components.train.cluster.jobs import (
    Stage,
    Step,
    environment,
    job_object,
    longest_run_s,
    pod_spec,
    resources,
)
from nudge.components.train.settings import LaunchSettings

KIND = ResourceKind(
    "trainer.kubeflow.org/v1alpha1",
    "TrainJob",
    "trainjobs",
    needs="Kubeflow Trainer (on OpenShift AI: component `trainer` of the DataScienceCluster)",
)
PATCH_MANAGER = "nudge.io/launcher"
POD_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""A label of a TrainJob's pods: its JobSet has the same name as the TrainJob."""

ASKED_FOR_PROGRESS = {
    "trainer.opendatahub.io/progression-tracking": "true",
    "trainer.opendatahub.io/metrics-port": str(PORT),
}
"""Makes OpenShift AI's controller ask the first pod for its progress, see `job_status`."""

CONTAINER = "node"
LOG = ({"batch.kubernetes.io/job-completion-index": "0"}, CONTAINER)
"""The pod of the first node, which runs the first rank."""


def body(
    settings: LaunchSettings,
    *,
    name: str,
    handover: str,
    schema: dict[str, Any],
    step: Step,
) -> dict[str, Any]:
    """The object, for a cluster whose TrainJob has this ``schema``.

    Newer releases take further settings of the pods as ``runtimePatches``, older ones as
    ``podTemplateOverrides``. Only newer ones have a deadline for the job and accept a container's
    security context in a patch; under older ones the runtime sets it.
    """
    known = schema["properties"]["spec"]["properties"]
    needed = resources(settings)
    trainer: dict[str, Any] = {
        "image": step.image,
        "command": ["python", "-P", "-m", "nudge.components.train.cluster.worker"],
        "args": [handover],
        "env": [*environment(settings, step), {"name": PORT_VARIABLE, "value": str(PORT)}],
        "numNodes": settings.nodes,
        "resourcesPerNode": {"requests": needed, "limits": needed},
    }
    # It was an int-or-string ("auto", "gpu") in older releases and is a number in newer ones.
    trainer["numProcPerNode"] = max(1, settings.gpus_per_node)
    spec: dict[str, Any] = {
        "runtimeRef": {"name": settings.runtime, "kind": settings.runtime_kind},
        "trainer": trainer,
    }
    if "activeDeadlineSeconds" in known:
        spec["activeDeadlineSeconds"] = longest_run_s(settings)
    newer = "runtimePatches" in known
    pods = pod_spec(settings, step, CONTAINER)
    field = known.get("runtimePatches" if newer else "podTemplateOverrides")
    if "securityContext" in _of_a_container(field):
        (container,) = pods.get("containers", [{"name": CONTAINER}])
        pods["containers"] = [{**container, "securityContext": RESTRICTED}]
    if pods and newer:
        template = {"template": {"spec": {"template": {"spec": pods}}}}
        replicated = [{"name": CONTAINER, **template}]
        patch = {"template": {"spec": {"replicatedJobs": replicated}}}
        spec["runtimePatches"] = [{"manager": PATCH_MANAGER, "trainingRuntimeSpec": patch}]
    elif pods:
        spec["podTemplateOverrides"] = [{"targetJobs": [{"name": CONTAINER}], "spec": pods}]
    return job_object(KIND, settings, name, step, spec, dict(ASKED_FOR_PROGRESS))


def pods(name: str) -> dict[str, str]:
    """Labels of all pods of the job of this name."""
    return {POD_LABEL: name}


def stage(job: dict[str, Any]) -> Stage:
    """The stage that the job's conditions report."""
    stages: dict[str, Stage] = {
        "Failed": "failed",
        "Complete": "complete",
        "Suspended": "suspended",
    }
    for type, found in stages.items():
        if (condition(job, type) or {}).get("status") == "True":
            return found
    # Kueue suspends a new job before Kubeflow Trainer reports any condition.
    resumed = condition(job, "Suspended") is not None
    return "suspended" if job["spec"].get("suspend") and not resumed else "running"


def describe_status(job: dict[str, Any]) -> str:
    """The conditions that Kubeflow Trainer reports, in one line."""
    return describe(job)


def refusal(job: dict[str, Any]) -> None:
    """None: a TrainJob's status has no error of the training; its pods have."""


def started_with(job: dict[str, Any]) -> Any:
    """The part of a job, besides its name, that belongs to one run only."""
    return job["spec"].get("trainer", {}).get("args")


def plain(line: str) -> str:
    """A line of the log as the training wrote it."""
    return line


def _of_a_container(schema: Any) -> set[str]:
    """The fields of a container that a patch may set, at any depth of its schema."""
    if not isinstance(schema, dict):
        return set()
    if "items" in schema.get("containers", {}):
        return set(schema["containers"]["items"]["properties"])
    return set().union(*(_of_a_container(each) for each in schema.values()))
