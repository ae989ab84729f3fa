"""The objects of serving on KServe, as plain dicts made from settings and a version.

Each version is an InferenceService of its own, and one OpenShift Route a model (elsewhere an
HTTPRoute, see `doors`) shares the requests among them by weight. KServe's own split would be one
object fewer, but ``spec.canary`` came only with OpenShift AI 3.5 (in Standard mode the older
``canaryTrafficPercent`` is silently ignored, https://github.com/kserve/kserve/issues/4074), forbids
autoscaling and more replicas than the stable version has, and ties all of a split to one version of
the registry. A Route means the same on every release, changes all weights in one request, and keeps
its address whatever stands behind it.
"""

import hashlib
import json
import re
from typing import Any

from nudge.components.common.clients.pods import QUEUE, RESTRICTED
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.clients.storage import split_s3_uri
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.settings import DeploySettings, KServeSettings
from nudge.components.deploy.verify import check_version, hook

Object = dict[str, Any]

MODEL, VERSION = "nudge-lm/model", "nudge-lm/version"
"""Annotations with the names as the registry has them."""

SETTINGS = "nudge-lm/settings"
"""Annotation with a digest of everything else here but the number of replicas. KServe copies it to
the pods, so that it tells the pods of these settings from older ones."""

STOP = "serving.kserve.io/stop"
"""Annotation by which the dashboard stops a model."""

AUTHENTICATION = "security.opendatahub.io/enable-auth"
OPEN = "nudge-lm/authentication"
"""Label of a server without a proxy in front, so that a NetworkPolicy can let clients reach it."""

GRACE_S = 30
"""Seconds that a server has to end after its requests did."""
SETTLES_S = 10
"""Seconds after which nothing new reaches a pod that is ending."""

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
"""A server that answers and does not say what is under way may be busy; one that does not listen is
not."""


def service_name(model: str, version: str) -> str:
    """The InferenceService of a version: its names as far as they fit, and a hash of them whole.

    At most 48 characters; KServe allows 53, and a host's first label (name and namespace) 63.
    """
    digest = hashlib.sha256(f"{model}\0{version}".encode()).hexdigest()[:6]
    return f"{_slug(model, 20)}-{_slug(version, 20)}-{digest}"


def endpoint_name(model: str) -> str:
    """The model's Route and Lease, and the label of all that belongs to it; at most 40 characters.

    The model's name itself where Kubernetes allows it, else with a hash.
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

    Raises `UserError` if the model's URI cannot be served from, is not where its uploads are, or no
    connection is given.
    """
    check_version(version, settings)
    place = settings.kserve
    annotations = {
        MODEL: version.model,
        VERSION: version.name,
        "openshift.io/display-name": f"{version.model} {version.name}",
        "openshift.io/description": f"{version.uri}, served by nudge",
        "serving.kserve.io/deploymentMode": "RawDeployment",
        AUTHENTICATION: str(place.authentication).lower(),
        "opendatahub.io/model-type": "generative",
    }
    labels = {
        **owned(version.model),
        "opendatahub.io/dashboard": "true",
        # The smoke test comes through the version's own Route, from here or from a laptop.
        "networking.kserve.io/visibility": "exposed",
        "modelregistry.opendatahub.io/registered-model-id": version.model_id,
        "modelregistry.opendatahub.io/model-version-id": version.id,
        "modelregistry.opendatahub.io/name": settings.registry_name,
    }
    if place.queue:
        labels[QUEUE] = place.queue
    if not place.authentication:
        labels[OPEN] = "false"
    name = service_name(version.model, version.name)
    served: Object = {
        "modelFormat": {"name": "vLLM"},
        "runtime": place.runtime,
        # Users ask for the model, whichever version answers; the version's own name is for those
        # who ask it alone. The last --served-model-name stands, and ours comes after the runtime's.
        "args": ["--served-model-name", version.model, name, *place.arguments],
        # Whatever the runtime says. This is for the server alone: KServe adds storage-initializer,
        # modelcar and kube-rbac-proxy without a securityContext (seen in the pods of OpenShift AI's
        # fork of 2026-08), and no field of an InferenceService sets theirs. An SCC fills them in; a
        # namespace without SCCs must allow the level baseline (see `readiness`).
        "securityContext": RESTRICTED,
        "lifecycle": {"preStop": {"exec": {"command": _until_quiet(place.request_timeout_s)}}},
    }
    predictor: Object = {
        "minReplicas": place.replicas,
        "maxReplicas": place.replicas,
        "timeout": place.request_timeout_s,
        "terminationGracePeriodSeconds": place.request_timeout_s + GRACE_S,
    }
    if place.stop_old_first:
        # A change of a version's own settings has no room for a second pod either.
        predictor["deploymentStrategy"] = {"type": "Recreate"}
    if version.uri.startswith("s3://"):
        served["storage"] = _storage(version, place)
        served["lifecycle"] |= hook(version)
        annotations["opendatahub.io/connections"] = place.connection
        annotations["opendatahub.io/connection-path"] = served["storage"]["path"]
    elif version.uri.startswith(("oci://", "pvc://", "hf://")):
        served["storageUri"] = version.uri
        if version.uri.startswith("oci:") and place.pull_secret:
            predictor["imagePullSecrets"] = [{"name": place.pull_secret}]
    else:
        raise UserError(
            f"KServe cannot serve {version.model} {version.name} from {version.uri}: expected "
            "s3://, oci://, pvc:// or hf://; upload it to the cluster's store and register it again"
        )
    if place.hardware_profile:
        namespace, _, profile = place.hardware_profile.rpartition("/")
        annotations["opendatahub.io/hardware-profile-name"] = profile
        if namespace:
            annotations["opendatahub.io/hardware-profile-namespace"] = namespace
    else:
        amounts = {"cpu": place.cpu, "memory": place.memory}
        if place.gpus:
            amounts[place.gpu_type] = str(place.gpus)
        served["resources"] = {"requests": amounts, "limits": amounts}
        predictor |= {"nodeSelector": place.node_selector, "tolerations": place.tolerations}
    made = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {"predictor": {**predictor, "model": served}},
    }
    annotations[SETTINGS] = _digest(made)
    return made


def _digest(made: Object) -> str:
    """A digest of what a change of would replace the pods; their number does not."""
    predictor = {
        key: value
        for key, value in made["spec"]["predictor"].items()
        if key not in ("minReplicas", "maxReplicas")
    }
    text = json.dumps([made["metadata"], predictor], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _until_quiet(longest_s: int) -> list[str]:
    """The command of a preStop hook: wait until vLLM has nothing under way, at most ``longest_s``.

    vLLM aborts what is under way at SIGTERM. For the first seconds the Service may still send
    requests, so quiet means none for `SETTLES_S`. Where the image has no Python it sleeps.
    """
    script = UNTIL_QUIET.format(longest_s=longest_s, settles_s=SETTLES_S)
    return ["/bin/sh", "-c", f'python3 -c "$0" || sleep {longest_s}', script]


def _storage(version: Version, place: KServeSettings) -> Object:
    bucket, path = split_s3_uri(version.uri)
    if not place.connection:
        raise UserError(
            f"{version.uri} is read through a data connection, and none is named: set "
            "deploy.kserve.connection to the name of its Secret in the namespace"
        )
    # The bucket is written as well, for a connection may name another one. KServe downloads every
    # key that starts with the path: without the slash, those of v10 for v1 too.
    return {"key": place.connection, "path": f"{path}/", "parameters": {"bucket": bucket}}


def _slug(name: str, length: int) -> str:
    """``name`` as a DNS label of at most ``length`` characters."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:length].strip("-")
    return plain if plain[:1].isalpha() else f"m-{plain}"[:length].strip("-")
