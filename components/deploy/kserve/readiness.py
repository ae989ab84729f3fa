"""Readiness from the pods of an InferenceService: is it ready, has it failed, why does it wait.

The InferenceService's own status cannot answer that. ``status.observedGeneration`` is the
Deployment's, and Ready stays True while the pods of an update crash or their image cannot be
pulled, because the old pods still serve (https://github.com/kserve/kserve/issues/1859). Its
annotations reach the pod template, so a digest of the settings there distinguishes the pods with
the current settings from older ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nudge.components.common.clients import pods as pod_reports
from nudge.components.common.clients.kube import POD, Cluster, ResourceKind, describe
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.kserve.objects import SETTINGS

REPLICASET = ResourceKind("apps/v1", "ReplicaSet", "replicasets")
SERVICE_LABEL = "serving.kserve.io/inferenceservice"

STUCK = (
    *("CrashLoopBackOff", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"),
    "PostStartHookError",  # the files differ from the evaluated ones; see `verify.hook`
    *("CreateContainerConfigError", "CreateContainerError"),
)
"""Reasons of waiting containers that someone must fix. CrashLoopBackOff appears only from the
second crash on; the first restart is immediate."""

SECURITY_HINT = (
    "KServe's own containers (storage-initializer, modelcar, kube-rbac-proxy) set no "
    "securityContext. OpenShift's SCCs fill it in; on a cluster without SCCs the namespace must "
    "allow the level baseline: kubectl label namespace {namespace} --overwrite "
    "pod-security.kubernetes.io/enforce=baseline"
)

Object = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """The state of a version's pods at one moment."""

    ready: bool = False
    """The wanted number of pods with these settings are Ready, and no others run."""
    failed: str = ""
    """Why it cannot become ready without a change."""
    suspect: str = ""
    """The same, from a status that may still describe the previous pods; it counts if it stays."""
    waiting: str = ""
    """What it is waiting for, if that is worth a line: a node, a quota, a restart."""


def look(cluster: Cluster, service: Object, digest: str | None) -> Finding:
    """The state of ``service``'s pods whose settings have this ``digest`` (None: not marked)."""
    name = service["metadata"]["name"]
    active, terminating = _pods(cluster, service)
    current = [pod for pod in active if digest_of(pod) == digest]
    wanted = max(1, int(service["spec"]["predictor"].get("minReplicas") or 1))
    if len(active) == len(current) == wanted and all(is_ready(pod) for pod in current):
        return Finding(ready=True)
    if any(_is_stuck(pod) for pod in current):
        return Finding(failed=pod_reports.why_of(cluster, current))
    model = (service.get("status") or {}).get("modelStatus") or {}
    transition = model.get("transitionStatus")
    if transition == "InvalidSpec":  # reported for the object alone: no pods, no generation
        runtime = service["spec"]["predictor"]["model"].get("runtime")
        return Finding(suspect=f"{_last_failure(model)} (runtime {runtime})")
    if transition == "BlockedByFailedLoad" and any(_has_failed(pod) for pod in current):
        why = pod_reports.why_of(cluster, current)
        return Finding(suspect=f"{_last_failure(model)}\n{why}".rstrip())
    if len(current) < wanted and (refused := _refused(cluster, name, digest)):
        if "exceeded quota" in refused and terminating:
            return Finding(waiting=f"{refused}; pods that use it are still terminating")
        if "violates PodSecurity" in refused:
            refused += f"; {SECURITY_HINT.format(namespace=cluster.namespace)}"
        return Finding(suspect=refused)
    return Finding(waiting=pod_reports.why_of(cluster, current, logs=False, events=False))


def some_ready(cluster: Cluster, service: Object) -> bool:
    """Whether any pod of a version is serving, whatever its settings."""
    return any(is_ready(pod) for pod in _pods(cluster, service)[0])


def why(cluster: Cluster, service: Object, digest: str | None) -> str:
    """Everything that is known about why a version is not ready: conditions, then pods."""
    current = [pod for pod in _pods(cluster, service)[0] if digest_of(pod) == digest]
    refused = _refused(cluster, service["metadata"]["name"], digest)
    parts = (describe(service), refused, pod_reports.why_of(cluster, current, service))
    return "\n".join(part for part in parts if part)


def digest_of(object: Mapping[str, Any]) -> str | None:
    """The digest of the settings that an InferenceService or a pod was created with, if marked."""
    digest = (object["metadata"].get("annotations") or {}).get(SETTINGS)
    return None if digest is None else str(digest)


def is_ready(pod: Object) -> bool:
    """Whether a pod takes requests."""
    conditions = pod.get("status", {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _pods(cluster: Cluster, service: Object) -> tuple[list[Object], bool]:
    """A version's active pods, and whether any pod of its model is terminating."""
    meta = service["metadata"]
    instance = (meta.get("labels") or {}).get("app.kubernetes.io/instance")
    labels = {"app.kubernetes.io/instance": instance} if instance else {SERVICE_LABEL: meta["name"]}
    unfinished = [
        pod
        for pod in cluster.list(POD, labels)
        # An evicted pod stays in phase Failed, but it no longer runs.
        if pod.get("status", {}).get("phase") not in ("Failed", "Succeeded")
    ]
    active = [
        pod
        for pod in unfinished
        if "deletionTimestamp" not in pod["metadata"]
        and (pod["metadata"].get("labels") or {}).get(SERVICE_LABEL) == meta["name"]
    ]
    return active, any("deletionTimestamp" in pod["metadata"] for pod in unfinished)


def _refused(cluster: Cluster, name: str, digest: str | None) -> str:
    """Why the ReplicaSet with these settings cannot create its pods, or an empty string."""
    try:
        sets = cluster.list(REPLICASET, {SERVICE_LABEL: name})
    except UserError:  # an older Role lacks this permission; other causes are still reported
        return ""
    for each in sets:
        template = each.get("spec", {}).get("template", {"metadata": {}})
        if digest_of(template) != digest or each["spec"].get("replicas") == 0:
            continue
        for condition in each.get("status", {}).get("conditions") or []:
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                message = condition.get("message") or "\n".join(pod_reports.warnings(cluster, each))
                return f"its pods cannot be created: {condition.get('reason', '')}: {message}"
    return ""


def _is_stuck(pod: Object) -> bool:
    waiting = (
        (status.get("state") or {}).get("waiting") or {} for status in pod_reports.containers(pod)
    )
    return any(each.get("reason") in STUCK for each in waiting)


def _has_failed(pod: Object) -> bool:
    return any(pod_reports.failed(status) for status in pod_reports.containers(pod))


def _last_failure(model: Object) -> str:
    info = model.get("lastFailureInfo") or {}
    parts = [str(info[key]) for key in ("reason", "message") if info.get(key)]
    if info.get("exitCode"):
        parts.append(f"(exit status {info['exitCode']})")
    return " ".join(parts) or str(model["transitionStatus"])
