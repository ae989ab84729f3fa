"""What the pods of an InferenceService say: is it ready, will it ever be, what does it wait for.

The InferenceService's own status cannot decide that. ``status.observedGeneration`` is the
Deployment's, and Ready stays True while the pods of an update crash or cannot be pulled, because
the old ones serve (https://github.com/kserve/kserve/issues/1859). Its annotations reach the pod
template, so a digest of the settings there tells the pods of the present settings from older ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nudge.components.common.clients import pods as common
from nudge.components.common.clients.kube import POD, Cluster, ResourceKind, describe
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.kserve.objects import SETTINGS

REPLICASET = ResourceKind("apps/v1", "ReplicaSet", "replicasets")
SERVICE_LABEL = "serving.kserve.io/inferenceservice"

STUCK = (
    *("CrashLoopBackOff", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"),
    "PostStartHookError",  # the files are not those that were evaluated; see `verify.hook`
    *("CreateContainerConfigError", "CreateContainerError"),
)
"""Waiting containers that need somebody to change something. CrashLoopBackOff is shown only from
the second crash on; the first restart comes at once."""

SECURITY_HINT = (
    "KServe's own containers (storage-initializer, modelcar, kube-rbac-proxy) set no "
    "securityContext. OpenShift's SCCs fill it in; on a cluster without SCCs the namespace must "
    "allow the level baseline: kubectl label namespace {namespace} --overwrite "
    "pod-security.kubernetes.io/enforce=baseline"
)

Object = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One look at a version's pods."""

    ready: bool = False
    """The wanted number of pods with these settings are Ready, and no other ones run."""
    failed: str = ""
    """Why it will not become ready by itself."""
    suspect: str = ""
    """The same, from a status that may be about what was there before; it counts if it stays."""
    waiting: str = ""
    """What it waits for, where that is worth a line: no node, a quota, a restart."""


def look(cluster: Cluster, service: Object, digest: str | None) -> Finding:
    """What the pods of ``service`` whose settings have this ``digest`` (None: not marked) say."""
    name = service["metadata"]["name"]
    found, leaving = _pods(cluster, service)
    present = [pod for pod in found if digest_of(pod) == digest]
    wanted = max(1, int(service["spec"]["predictor"].get("minReplicas") or 1))
    if len(found) == len(present) == wanted and all(is_ready(pod) for pod in present):
        return Finding(ready=True)
    if any(_stuck(pod) for pod in present):
        return Finding(failed=common.why_of(cluster, present))
    model = (service.get("status") or {}).get("modelStatus") or {}
    transition = model.get("transitionStatus")
    if transition == "InvalidSpec":  # of the object alone; it has no pods and no generation
        runtime = service["spec"]["predictor"]["model"].get("runtime")
        return Finding(suspect=f"{_last_failure(model)} (runtime {runtime})")
    if transition == "BlockedByFailedLoad" and any(_has_failed(pod) for pod in present):
        why = common.why_of(cluster, present)
        return Finding(suspect=f"{_last_failure(model)}\n{why}".rstrip())
    if len(present) < wanted and (refused := _refused(cluster, name, digest)):
        if "exceeded quota" in refused and leaving:
            return Finding(waiting=f"{refused}; pods that use it are still ending")
        if "violates PodSecurity" in refused:
            refused += f"; {SECURITY_HINT.format(namespace=cluster.namespace)}"
        return Finding(suspect=refused)
    return Finding(waiting=common.why_of(cluster, present, logs=False, events=False))


def some_ready(cluster: Cluster, service: Object) -> bool:
    """Whether any pod of a version serves, whatever its settings."""
    return any(is_ready(pod) for pod in _pods(cluster, service)[0])


def why(cluster: Cluster, service: Object, digest: str | None) -> str:
    """Everything that is known about why a version is not ready: conditions, then pods."""
    found = [pod for pod in _pods(cluster, service)[0] if digest_of(pod) == digest]
    refused = _refused(cluster, service["metadata"]["name"], digest)
    parts = (describe(service), refused, common.why_of(cluster, found, service))
    return "\n".join(part for part in parts if part)


def digest_of(object: Mapping[str, Any]) -> str | None:
    """The digest of the settings that an InferenceService or a pod was made with."""
    found = (object["metadata"].get("annotations") or {}).get(SETTINGS)
    return None if found is None else str(found)


def is_ready(pod: Object) -> bool:
    """Whether a pod takes requests."""
    conditions = pod.get("status", {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _pods(cluster: Cluster, service: Object) -> tuple[list[Object], bool]:
    """The pods of a version that run or are to run; and whether any of its model's is ending."""
    meta = service["metadata"]
    instance = (meta.get("labels") or {}).get("app.kubernetes.io/instance")
    labels = {"app.kubernetes.io/instance": instance} if instance else {SERVICE_LABEL: meta["name"]}
    there = [
        pod
        for pod in cluster.list(POD, labels)
        # An evicted pod stays as Failed; it runs no more.
        if pod.get("status", {}).get("phase") not in ("Failed", "Succeeded")
    ]
    found = [
        pod
        for pod in there
        if "deletionTimestamp" not in pod["metadata"]
        and (pod["metadata"].get("labels") or {}).get(SERVICE_LABEL) == meta["name"]
    ]
    return found, any("deletionTimestamp" in pod["metadata"] for pod in there)


def _refused(cluster: Cluster, name: str, digest: str | None) -> str:
    """Why the ReplicaSet of these settings cannot create its pods, or an empty string."""
    try:
        sets = cluster.list(REPLICASET, {SERVICE_LABEL: name})
    except UserError:  # an older Role lacks the right; what else is known is still reported
        return ""
    for each in sets:
        template = each.get("spec", {}).get("template", {"metadata": {}})
        if digest_of(template) != digest or each["spec"].get("replicas") == 0:
            continue
        for condition in each.get("status", {}).get("conditions") or []:
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                said = condition.get("message") or "\n".join(common.warnings(cluster, each))
                return f"its pods cannot be created: {condition.get('reason', '')}: {said}"
    return ""


def _stuck(pod: Object) -> bool:
    waiting = (
        (status.get("state") or {}).get("waiting") or {} for status in common.containers(pod)
    )
    return any(each.get("reason") in STUCK for each in waiting)


def _has_failed(pod: Object) -> bool:
    return any(common.failed(status) for status in common.containers(pod))


def _last_failure(model: Object) -> str:
    info = model.get("lastFailureInfo") or {}
    parts = [str(info[key]) for key in ("reason", "message") if info.get(key)]
    if info.get("exitCode"):
        parts.append(f"(exit status {info['exitCode']})")
    return " ".join(parts) or str(model["transitionStatus"])
