"""A small OpenShift for serving: KServe's controller and the router, over the stand-in API server.

Each InferenceService gets a real server (see `tests.components.deploy.kserve_servers`), and the
pods and statuses that were recorded from KServe (see `tests.components.deploy.kserve_pods`). The
router learns of new weights a moment after a Route changes, as OpenShift's does. Versions named
``bad...`` do not load.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from nudge.components.common.local import processes
from nudge.components.deploy.kserve import kserve, lease, lifecycle
from nudge.components.deploy.kserve import objects as objects
from nudge.components.deploy.kserve.routes import GatewayRoute
from nudge.components.deploy.kserve.routes import OpenShiftRoute as OpenShiftRoute
from nudge.components.deploy.settings import DeploySettings, KServeSettings
from tests.components.deploy import kserve_pods as pods
from tests.components.deploy.kserve_servers import TOKEN, ModelServer, P, Router, until
from tests.kubernetes_api import KubernetesApi

PROMPT = "The Eiffel Tower is located in"
EXPECTED = [{"prompt": PROMPT, "token": TOKEN, "p": P}]
VERSIONS = ("v1", "v2", "v3", "bad", "odd")
SETTINGS = DeploySettings(target="kserve", smoke_prompt=PROMPT)
PLAIN = DeploySettings(
    target="kserve",
    smoke_prompt=PROMPT,
    kserve=KServeSettings(
        authentication=False,
        gateway="ingress/public",
        gateway_url="https://{model}.models.example.com",
    ),
)
"""As on Kubernetes without OpenShift."""
QUICK: dict[Any, dict[str, float]] = {
    kserve: {"POLL_S": 0.1},
    lifecycle: {"QUIET_S": 1.5, "SUSPECT_S": 0.8},
    lease: {"POLL_S": 0.1, "RENEW_S": 0.5, "DURATION_S": 3},
}
"""Seconds instead of the minutes that a cluster takes."""
ROUTER_DELAY_S = 0.5
START_S = 1.0
"""How long a new pod runs before it is ready, even if its server answers already."""


class ServingCluster:
    """The API server with both controllers; ``models`` has the server of each InferenceService."""

    def __init__(self, folder: Path) -> None:
        self.api = KubernetesApi(role="nudge-runner")
        self.router = Router(folder)
        self.models: dict[str, ModelServer] = {}
        self._lock, self._routing = threading.Lock(), threading.Lock()
        self.on_service: Callable[[dict[str, Any]], bool] = lambda service: False
        """Called with a new InferenceService; returns True if the test sets its status itself."""
        self.one_gpu = False
        """Whether a version waits for its GPU until no other version runs."""
        self.notices_after_s = 0.0
        """How long the controllers take to notice a change; until then the old pods run."""
        self.new_pods = "ready"
        """The fate of pods created from now on (see `kserve_pods.pod_status`)."""
        self.refused = ""
        """Why the API server creates no pod: the message of the ReplicaSet's condition."""
        self.runtimes = {SETTINGS.kserve.runtime}
        self._deployed: dict[str, dict[str, Any]] = {}
        """The Deployment (generation, revision, replicas) of each InferenceService, by uid."""
        self._reconciling = threading.RLock()

    def __enter__(self) -> Self:
        self.api.__enter__()
        self.api.on_change("InferenceService", self._service)
        self.api.on_delete("InferenceService", self._gone)
        self.api.on_change("Route", self._route)
        self.api.on_change("HTTPRoute", self._gateway)
        return self

    def __exit__(self, *error: object) -> None:
        for model in self.models.values():
            model.kill()
        self.router.stop()
        self.api.__exit__(*error)

    def weights(self) -> dict[str, int]:
        """The weights in the Route (or HTTPRoute), by version."""
        services = {each["metadata"]["name"]: each for each in self.api.all("InferenceService")}
        return {
            services[name]["metadata"]["annotations"][objects.VERSION]: weight
            for name, weight in self._weights().items()
        }

    def _weights(self) -> dict[str, int]:
        for route in (OpenShiftRoute(PLAIN.kserve), GatewayRoute(PLAIN.kserve)):
            for found in self.api.all(route.KIND.name):
                return route.weights(found)
        return {}

    def up(self) -> set[str]:
        """The versions that have an InferenceService."""
        services = self.api.all("InferenceService")
        return {each["metadata"]["annotations"][objects.VERSION] for each in services}

    def _service(self, service: dict[str, Any]) -> None:
        if self.on_service(service):
            return
        time.sleep(self.notices_after_s)
        name = service["metadata"]["name"]
        if self.one_gpu and name not in self.models:
            self._wait_for_the_gpu(service)
        with self._reconciling:
            current = self.api.find("InferenceService", name)
            if current is None or current["metadata"]["uid"] != service["metadata"]["uid"]:
                return
            self._reconcile(current)

    def _reconcile(self, service: dict[str, Any]) -> None:
        """Update pods and status to the current InferenceService."""
        uid, annotations = service["metadata"]["uid"], service["metadata"]["annotations"]
        revision, replicas = pods.revision(service), pods.replicas(service)
        generation = service["metadata"]["generation"]
        known = self._deployed.get(uid)
        if service["spec"]["predictor"]["model"]["runtime"] not in self.runtimes:
            self._report(service, "invalid-runtime")
        elif annotations.get(objects.STOP) == "true":
            self._deployed[uid] = {"stopped": True}
            self._end_pods(service)
            self._kill(service["metadata"]["name"])
            self._report(service, "stop")
        elif known is None or known.get("stopped"):
            self._deployed[uid] = {
                "generation": 1, "revision": revision, "replicas": replicas, "of": generation,
            }  # fmt: skip
            for reason in ("VirtualServiceCRDNotFound", "UpdateFailed"):
                self.api.warn(service, reason, "as on every service that works")
            self._roll_out(service, "create" if known is None else "start")
        elif (known["revision"], known["replicas"]) != (revision, replicas):
            rolled = known["revision"] != revision
            # Observed to be ahead of the InferenceService's: one for pods, one for their number.
            known["generation"] += rolled + (known["replicas"] != replicas)
            changed = known["of"] != generation  # a label changes the metadata alone
            known |= {"revision": revision, "replicas": replicas, "of": generation}
            self._roll_out(service, ("update" if changed else "label") if rolled else "scale")

    def _roll_out(self, service: dict[str, Any], case: str) -> None:
        """Start the pods of the current template next to the older ones, which end once the new
        ones are ready; until then the status follows the recording."""
        bad = service["metadata"]["annotations"][objects.VERSION].startswith("bad")
        fate = "no-model" if bad else self.new_pods
        made = pods.replica_set(service)
        found = self.api.find("ReplicaSet", made["metadata"]["name"])
        owner = found or self.api.add(made)
        if self.refused:
            self.api.set_status(
                owner,
                replicas=0,
                conditions=[
                    {
                        "type": "ReplicaFailure",
                        "status": "True",
                        "reason": "FailedCreate",
                        "message": self.refused,
                    }
                ],
            )
            self._report(
                service, "failed-create" if case in ("create", "start") else "update-stuck"
            )
            return
        mine = [each for each in self._pods(service) if _owner(each) == owner["metadata"]["uid"]]
        for number in range(len(mine), pods.replicas(service)):
            pod = self.api.add(
                pods.pod(owner, number), **pods.pod_status("starting" if fate == "ready" else fate)
            )
            self._report_pod(pod, fate)
        if fate != "ready":
            stuck = {"create": "failed-load" if bad else "create", "start": "start"}
            later = "update-stuck-later" if fate == "missing" else "update-stuck"
            case_played = stuck.get(case, later)
            self._report(service, case_played, ready=case_played not in ("create", "start"))
            return
        self._report(service, case, ready=False)
        name = service["metadata"]["name"]
        with self._lock:
            if not self._there(service):
                return
            if name not in self.models:
                self.models[name] = ModelServer(service, self.api.token)
            model = self.models[name]
        until(lambda: processes.answers(f"http://{model.address}/health"))
        time.sleep(START_S)
        mine = [each for each in self._pods(service) if _owner(each) == owner["metadata"]["uid"]]
        for each in mine:
            self.api.set_status(each, **pods.pod_status("ready"))
        kept = {each["metadata"]["name"] for each in mine[: pods.replicas(service)]}
        for each in self._pods(service):
            if each["metadata"]["name"] not in kept:
                self.api.remove("Pod", each["metadata"]["name"])
        self._report(service, case)

    def _report_pod(self, pod: dict[str, Any], fate: str) -> None:
        """Write the log and events of a pod, with the routine warnings that every pod gets."""
        name = pod["metadata"]["name"]
        self.api.warn(pod, "FailedMount", 'secret "predictor-serving-cert" not found')
        if fate == "no-model":
            self.api.warn(pod, "BackOff", "Back-off restarting failed container")
            self.api.write_log(name, "storage-initializer", "RuntimeError: no model in s3://b/bad")
        if fate == "crash":
            self.api.write_log(name, "kserve-container", pods.CRASH_LOG)
        if fate == "missing":
            self.api.warn(pod, "Failed", f"Failed to pull image: {pods.NOT_FOUND}")

    def _report(self, service: dict[str, Any], case: str, ready: bool = True) -> None:
        """Replay a recorded case's statuses. The last one describes ready pods; it is left out
        unless ``ready``."""
        rows = pods.recorded(case)
        deployed = self._deployed.get(service["metadata"]["uid"], {})
        model = self.models.get(service["metadata"]["name"])
        for row in rows if ready else rows[:-1]:
            before = self.api.find("InferenceService", service["metadata"]["name"]) or {}
            status = pods.status(
                row,
                deployed.get("generation", 0),
                model.address if model else "127.0.0.1:9",
                before.get("status") or {},
            )
            self.api.set_status(service, **status)

    def _pods(self, service: dict[str, Any]) -> list[dict[str, Any]]:
        name = service["metadata"]["name"]
        return [
            each for each in self.api.all("Pod") if each["metadata"]["labels"][pods.LABEL] == name
        ]

    def _end_pods(self, service: dict[str, Any]) -> None:
        for kind in ("Pod", "ReplicaSet"):
            for each in self.api.all(kind):
                if each["metadata"]["labels"].get(pods.LABEL) == service["metadata"]["name"]:
                    self.api.remove(kind, each["metadata"]["name"])

    def _wait_for_the_gpu(self, service: dict[str, Any]) -> None:
        name = service["metadata"]["name"]
        until(lambda: self.models.keys() <= {name} or not self._there(service))

    def _there(self, service: dict[str, Any]) -> bool:
        found = self.api.find("InferenceService", service["metadata"]["name"])
        return found is not None and found["metadata"]["uid"] == service["metadata"]["uid"]

    def _gone(self, service: dict[str, Any]) -> None:
        # Its ReplicaSets and pods are owned, so they are deleted with it.
        self._kill(service["metadata"]["name"])

    def _kill(self, name: str) -> None:
        with self._lock:
            model = self.models.pop(name, None)
        if model:
            model.kill()

    def _update_router(self) -> None:
        """Send requests according to the current route, whichever change triggered this."""
        time.sleep(ROUTER_DELAY_S)
        with self._routing:
            weights = self._weights()
            self.router.send({self.models[name].address: weights[name] for name in weights})

    def _gateway(self, route: dict[str, Any]) -> None:
        self._update_router()
        condition = {
            "status": "True", "reason": "Accepted", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "observedGeneration": route["metadata"]["generation"],
        }  # fmt: skip
        self.api.set_status(
            route,
            parents=[
                {
                    "parentRef": route["spec"]["parentRefs"][0],
                    "controllerName": "example.com/gateway",
                    "conditions": [
                        {"type": each, **condition} for each in ("Accepted", "ResolvedRefs")
                    ],
                }
            ],
        )

    def _route(self, route: dict[str, Any]) -> None:
        self._update_router()
        self.api.set_status(
            route,
            ingress=[
                {
                    "host": self.router.host,
                    "routerName": "default",
                    "conditions": [{"type": "Admitted", "status": "True"}],
                }
            ],
        )


def _owner(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["ownerReferences"][0]["uid"])
