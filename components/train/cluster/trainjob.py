"""A Kubeflow TrainJob as a plain object: trainer.kubeflow.org/v1alpha1."""

from typing import Any

from nudge.components.common.clients.kube import ResourceKind, condition, describe
from nudge.components.common.clients.pods import RESTRICTED
from nudge.components.train.cluster.job_status import PORT, PORT_VARIABLE
from nudge.components.train.cluster.jobs import (
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
    "trainer.kubeflow.org/v1alpha1",
    "TrainJob",
    "trainjobs",
    needs="Kubeflow Trainer (on OpenShift AI: component `trainer` of the DataScienceCluster)",
)
PATCH_MANAGER = "nudge.io/launcher"
POD_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""What the pods of a TrainJob carry: the JobSet has the job's name."""

ASKED_FOR_PROGRESS = {
    "trainer.opendatahub.io/progression-tracking": "true",
    "trainer.opendatahub.io/metrics-port": str(PORT),
}
"""Lets OpenShift AI's controller ask the first pod how far it is, see `job_status`."""

CONTAINER = "node"
LOG = ({"batch.kubernetes.io/job-completion-index": "0"}, CONTAINER)
"""The first node's, where the first rank is."""


def body(
    settings: LaunchSettings,
    *,
    name: str,
    exchange: str,
    schema: dict[str, Any],
    step: Step,
) -> dict[str, Any]:
    """The object, for a cluster whose TrainJob has this ``schema``.

    Newer releases take what the pods need besides as ``runtimePatches``, older ones as
    ``podTemplateOverrides``. Only newer ones know a deadline of the job's own and, in a patch, a
    container's security context: under the older ones that is the runtime's to say.
    """
    known = schema["properties"]["spec"]["properties"]
    asked = resources(settings)
    trainer: dict[str, Any] = {
        "image": step.image,
        "command": ["python", "-P", "-m", "nudge.components.train.cluster.worker"],
        "args": [exchange],
        "env": [*environment(settings, step), {"name": PORT_VARIABLE, "value": str(PORT)}],
        "numNodes": settings.nodes,
        "resourcesPerNode": {"requests": asked, "limits": asked},
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
    metadata: dict[str, Any] = {
        "name": name,
        "labels": labels_of(settings, name),
        "annotations": dict(ASKED_FOR_PROGRESS),
    }
    if step.owner:
        metadata["ownerReferences"] = [step.owner]
    return {
        "apiVersion": KIND.api_version,
        "kind": KIND.name,
        "metadata": metadata,
        "spec": spec,
    }


def pods(name: str) -> dict[str, str]:
    """Labels of all pods of the job of this name."""
    return {POD_LABEL: name}


def stage(job: dict[str, Any]) -> Stage:
    """Where the job stands, by its conditions."""
    stages: dict[str, Stage] = {
        "Failed": "failed",
        "Complete": "complete",
        "Suspended": "suspended",
    }
    for type, found in stages.items():
        if (condition(job, type) or {}).get("status") == "True":
            return found
    return "running"


def describe_status(job: dict[str, Any]) -> str:
    """What Kubeflow Trainer says of the job, in one line."""
    return describe(job)


def started_with(job: dict[str, Any]) -> Any:
    """What makes a job that of a run besides its name."""
    return job["spec"].get("trainer", {}).get("args")


def plain(line: str) -> str:
    """A line of the log as the training wrote it."""
    return line


def _of_a_container(schema: Any) -> set[str]:
    """What a patch may say of a container, wherever in its schema that stands."""
    if not isinstance(schema, dict):
        return set()
    if "items" in schema.get("containers", {}):
        return set(schema["containers"]["items"]["properties"])
    return set().union(*(_of_a_container(each) for each in schema.values()))
