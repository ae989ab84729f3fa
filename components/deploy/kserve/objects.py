"""The KServe objects that serve a version, as plain dicts built from the settings and the version.

Each version has its own InferenceService, and one OpenShift Route per model (elsewhere an
HTTPRoute, see `routes`) splits the requests among them by weight. KServe's own split would need one
object fewer, but ``spec.canary`` came only with OpenShift AI 3.5 (in Standard mode the older
``canaryTrafficPercent`` is silently ignored, https://github.com/kserve/kserve/issues/4074), forbids
autoscaling and more replicas than the stable version has, and ties the complete split to one
version of the registry. A Route means the same on every release, changes all weights in one
request, and keeps its address whatever is behind it.
"""

import hashlib
import json
import re
from typing import Any

from nudge.components.common.clients.kube import ResourceKind
from nudge.components.common.clients.pods import QUEUE, RESTRICTED
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.clients.storage import split_s3_uri
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.settings import DeploySettings, KServeSettings
from nudge.components.deploy.verify import check_version, hook

Object = dict[str, Any]

INFERENCE_SERVICE = ResourceKind(
    "serving.kserve.io/v1beta1",
    "InferenceService",
    "inferenceservices",
    "KServe: the component kserve of OpenShift AI",
)

MODEL, VERSION = "nudge-lm/model", "nudge-lm/version"
"""Annotations with the names as the registry has them."""

SETTINGS = "nudge-lm/settings"
"""Annotation with a digest of everything else here except the number of replicas. KServe copies it
to the pods, so it distinguishes the pods with these settings from older ones."""

STOP = "serving.kserve.io/stop"
"""Annotation with which the dashboard stops a model."""

AUTHENTICATION = "security.opendatahub.io/enable-auth"
OPEN = "nudge-lm/authentication"
"""Label of a server without a proxy in front, so that a NetworkPolicy can let clients reach it."""

GRACE_S = 30
"""Seconds that a server has to exit after its last request."""
SETTLES_S = 10
"""Seconds after which no new request reaches a terminating pod."""

UNTIL_QUIET = """\
import time, urllib.error, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))
NAMES = ("vllm:num_requests_running", "vllm:num_requests_waiting")
def busy():
    try:
        with opener.open("http://127.0.0.1:8080/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except (urllib.error.HTTPError, TimeoutError):
        return True
    except OSError:
        return False
    counts = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(NAMES)]
    return sum(counts) > 0 or not counts
end = time.monotonic() + {longest_s}
quiet = time.monotonic()
while time.monotonic() < min(end, quiet + {settles_s}):
    if busy():
        quiet = time.monotonic()
    time.sleep(1)
"""
"""The preStop script. A server that answers but does not report its requests may be busy; one that
does not listen is not."""


def service_name(model: str, version: str) -> str:
    """The name of a version's InferenceService: shortened names and a hash of the full ones.

    At most 48 characters; KServe allows 53, and a host's first label (name and namespace) 63.
    """
    digest = hashlib.sha256(f"{model}\0{version}".encode()).hexdigest()[:6]
    return f"{_slug(model, 20)}-{_slug(version, 20)}-{digest}"


def endpoint_name(model: str) -> str:
    """The name of the model's Route and Lease, and the label of its objects; up to 40 characters.

    The model's own name if Kubernetes allows it, otherwise shortened, with a hash.
    """
    if model == _slug(model, 40):
        return model
    return f"{_slug(model, 33)}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def owned(model: str) -> dict[str, str]:
    """The labels of the objects that serve a model."""
    return {
        "app.kubernetes.io/managed-by": "nudge",
        "app.kubernetes.io/instance": endpoint_name(model),
    }


def inference_service(version: Version, settings: DeploySettings) -> Object:
    """A version on KServe, as the OpenShift AI dashboard writes one and ties it to the registry.

    Raises `UserError` if KServe cannot serve from the model's URI, if the URI is not where the
    model's uploads are, or if an s3:// model has no connection.
    """
    check_version(version, settings)
    kserve = settings.kserve
    name = service_name(version.model, version.name)
    predictor = _predictor(kserve)
    server = _server(version, name, kserve)
    annotations = _annotations(version, kserve)
    if version.uri.startswith("s3://"):
        server["storage"] = _storage(version, kserve)
        server["lifecycle"] |= hook(version)
        annotations["opendatahub.io/connections"] = kserve.connection
        annotations["opendatahub.io/connection-path"] = server["storage"]["path"]
    elif version.uri.startswith(("oci://", "pvc://", "hf://")):
        server["storageUri"] = version.uri
        if version.uri.startswith("oci:") and kserve.pull_secret:
            predictor["imagePullSecrets"] = [{"name": kserve.pull_secret}]
    else:
        raise UserError(
            f"KServe cannot serve {version.model} {version.name} from {version.uri}: expected "
            "s3://, oci://, pvc:// or hf://; upload it to the cluster's store and register it again"
        )
    if kserve.hardware_profile:
        namespace, _, profile = kserve.hardware_profile.rpartition("/")
        annotations["opendatahub.io/hardware-profile-name"] = profile
        if namespace:
            annotations["opendatahub.io/hardware-profile-namespace"] = namespace
    else:
        amounts = {"cpu": kserve.cpu, "memory": kserve.memory}
        if kserve.gpus:
            amounts[kserve.gpu_type] = str(kserve.gpus)
        server["resources"] = {"requests": amounts, "limits": amounts}
        predictor |= {"nodeSelector": kserve.node_selector, "tolerations": kserve.tolerations}
    labels = _labels(version, settings)
    body = {
        "apiVersion": INFERENCE_SERVICE.api_version,
        "kind": INFERENCE_SERVICE.name,
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {"predictor": {**predictor, "model": server}},
    }
    annotations[SETTINGS] = _digest(body)
    return body


def _annotations(version: Version, kserve: KServeSettings) -> dict[str, str]:
    return {
        MODEL: version.model,
        VERSION: version.name,
        "openshift.io/display-name": f"{version.model} {version.name}",
        "openshift.io/description": f"{version.uri}, served by nudge",
        "serving.kserve.io/deploymentMode": "RawDeployment",
        AUTHENTICATION: str(kserve.authentication).lower(),
        "opendatahub.io/model-type": "generative",
    }


def _labels(version: Version, settings: DeploySettings) -> dict[str, str]:
    labels = {
        **owned(version.model),
        "opendatahub.io/dashboard": "true",
        # The smoke test uses the version's own Route, from here or from a laptop.
        "networking.kserve.io/visibility": "exposed",
        "modelregistry.opendatahub.io/registered-model-id": version.model_id,
        "modelregistry.opendatahub.io/model-version-id": version.id,
        "modelregistry.opendatahub.io/name": settings.registry_name,
    }
    if settings.kserve.queue:
        labels[QUEUE] = settings.kserve.queue
    if not settings.kserve.authentication:
        labels[OPEN] = "false"
    return labels


def _server(version: Version, name: str, kserve: KServeSettings) -> Object:
    """The container of the server, without its storage and resources."""
    return {
        "modelFormat": {"name": "vLLM"},
        "runtime": kserve.runtime,
        # Users ask for the model, whichever version answers; the version's own name is for those
        # who want that version. The last --served-model-name wins, and ours comes after the
        # runtime's.
        "args": ["--served-model-name", version.model, name, *kserve.arguments],
        # Whatever the runtime says. This covers the server alone: KServe adds storage-initializer,
        # modelcar and kube-rbac-proxy without a securityContext (seen in the pods of OpenShift AI's
        # fork of 2026-08), and no field of an InferenceService sets theirs. An SCC fills them in; a
        # namespace without SCCs must allow the level baseline (see `readiness`).
        "securityContext": RESTRICTED,
        "lifecycle": {"preStop": {"exec": {"command": _until_quiet(kserve.request_timeout_s)}}},
    }


def _predictor(kserve: KServeSettings) -> Object:
    predictor: Object = {
        "minReplicas": kserve.replicas,
        "maxReplicas": kserve.replicas,
        "timeout": kserve.request_timeout_s,
        "terminationGracePeriodSeconds": kserve.request_timeout_s + GRACE_S,
    }
    if kserve.stop_old_first:
        # A change of a version's own settings has no room for a second pod either.
        predictor["deploymentStrategy"] = {"type": "Recreate"}
    return predictor


def _digest(body: Object) -> str:
    """A digest of everything whose change replaces the pods; the number of replicas does not."""
    predictor = {
        key: value
        for key, value in body["spec"]["predictor"].items()
        if key not in ("minReplicas", "maxReplicas")
    }
    text = json.dumps([body["metadata"], predictor], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _until_quiet(longest_s: int) -> list[str]:
    """The command of a preStop hook: wait until vLLM has no request, at most ``longest_s``.

    vLLM aborts requests in flight at SIGTERM. For the first seconds the Service may still send new
    ones, so quiet means none for `SETTLES_S`. If the image has no Python, the hook sleeps.
    """
    script = UNTIL_QUIET.format(longest_s=longest_s, settles_s=SETTLES_S)
    return ["/bin/sh", "-c", f'python3 -c "$0" || sleep {longest_s}', script]


def _storage(version: Version, kserve: KServeSettings) -> Object:
    bucket, path = split_s3_uri(version.uri)
    if not kserve.connection:
        raise UserError(
            f"{version.uri} is read through a data connection, but none is set: set "
            "deploy.kserve.connection to the name of its Secret in the namespace"
        )
    # Name the bucket, because the connection may name another one. KServe downloads every key that
    # starts with the path: without the slash, v1 would include the keys of v10.
    return {"key": kserve.connection, "path": f"{path}/", "parameters": {"bucket": bucket}}


def _slug(name: str, length: int) -> str:
    """``name`` as a DNS label of at most ``length`` characters."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:length].strip("-")
    return plain if plain[:1].isalpha() else f"m-{plain}"[:length].strip("-")
