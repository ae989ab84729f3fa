"""Serving on a cluster: an InferenceService a version (`kserve_objects`), a model's `doors`."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import tenacity
from nudge.components.common import kube, pods
from nudge.components.common.errors import UserError
from nudge.components.common.kube import Cluster, Conflict, Kind
from nudge.components.common.releases import Version
from nudge.components.deploy import kserve_objects as objects
from nudge.components.deploy.doors import Door, GatewayRoute, Route, of_another
from nudge.components.deploy.lease import Held, held
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import Server
from nudge.components.deploy.verify import check_image

SERVICE = Kind(
    "serving.kserve.io/v1beta1",
    "InferenceService",
    "inferenceservices",
    "KServe: the component kserve of OpenShift AI",
)

POLL_S = 3.0
LEASE_WAIT_S = 90.0
"""Longer than a killed holder's Lease lasts, so that running again is all that there is to do."""
ROUTER_S = 60.0
"""How long a router may take to send requests where a changed door says."""
QUIET_S = 15.0
"""A server is done when nothing was under way on it for this long after the traffic moved:
OpenShift's router reads changes every 5 s, and some replica may not have been asked."""

BLOCKED = ("BlockedByFailedLoad", "InvalidSpec")
STUCK = (
    *("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError"),
    "PostStartHookError",  # the files are not those that were evaluated; see `verify.hook`
)
"""Waiting containers that KServe reports as pending for ever."""


class KServe:
    """A `Target`: one namespace of a cluster."""

    def __init__(self, cluster: Cluster, settings: DeploySettings) -> None:
        self._cluster, self._settings = cluster, settings
        place = settings.kserve
        self._door: Door = GatewayRoute(place) if place.gateway else Route(place)
        self._lease: Held | None = None
        self._seen: dict[str, int] = {}
        self.environment = cluster.namespace
        self.runtime = settings.kserve.runtime

    @contextlib.contextmanager
    def exclusive(self, model: str) -> Iterator[None]:
        """Hold the model's Lease; see `nudge.components.deploy.lease`."""
        name = objects.endpoint_name(model)
        with held(self._cluster, f"nudge-{name}", objects.owned(model), LEASE_WAIT_S) as lease:
            self._lease, self._seen = lease, self._weights(model)
            yield

    def live(self, model: str) -> dict[str, int]:
        """The weight of each version behind the model's door."""
        weights = self._weights(model)
        return {
            version: weights[_name(service)]
            for version, service in self._services(model)
            if _name(service) in weights
        }

    def bring_up(self, version: Version) -> Server:
        """Create the version's InferenceService, or bring it up to the settings, and wait for it.

        Raises `UserError` with what KServe, the pods' events and the log of a failed container say.
        """
        self._check()
        body = objects.inference_service(version, self._settings)
        if version.uri.startswith("oci:"):
            check_image(version)
        name = _name(body)
        found = self._cluster.get(SERVICE, name)
        if found and name in self._seen:
            _same_door(found, body)
        elif found and ("deletionTimestamp" in found["metadata"] or _blocked(found)):
            # An earlier try may have failed for a cause that is mended by now.
            self._remove(found)
        applied = self._cluster.apply(SERVICE, body, force=True)
        address = self._cluster.poll(
            SERVICE,
            name,
            self._judge,
            timeout_s=self._settings.kserve.start_timeout_s,
            interval_s=POLL_S,
            late=lambda: self._why(applied),
        )
        return self._server(address)

    def make_room(self, model: str, wanted: set[str]) -> bool:
        """As in `Target`, if the settings ask for it and something wanted does not run yet."""
        if not self._settings.kserve.stop_old_first:
            return False
        services = dict(self._services(model))
        up = {version for version, service in services.items() if _serves(service)}
        going = services.keys() - wanted
        if wanted <= up or not going:
            return False
        live = self.live(model)
        if live.keys() & going:
            staying = {each: live[each] for each in live.keys() & wanted}
            self.move(model, staying or dict.fromkeys(live, 0))
        self.retire(model, wanted)
        return True

    def move(self, model: str, shares: dict[str, int]) -> str:
        """Give the model's door these weights, in one request; returns its URL.

        Raises `UserError` if somebody else changed them since this shift began.
        """
        door, body = self._door, self._door.body(model, shares)
        name, wanted = _name(body), door.weights(body)
        for attempt in tenacity.Retrying(
            stop=tenacity.stop_after_delay(ROUTER_S),
            wait=tenacity.wait_fixed(0.2),
            retry=tenacity.retry_if_exception_type(Conflict),
        ):
            with attempt:
                self._check()
                found = self._found(model)
                weights = door.weights(found) if found else {}
                if weights not in (self._seen, wanted):
                    raise UserError(
                        f"the {door.KIND.name} {name} was changed by somebody else meanwhile; run "
                        "this again"
                    )
                if found is None:
                    self._cluster.create(door.KIND, body)
                else:
                    # A Route's spec is changed by a patch: not every release of OpenShift takes a
                    # server-side apply for it. The router's own notes change the revision as well,
                    # so a conflict is looked at again.
                    revision = {"resourceVersion": found["metadata"]["resourceVersion"]}
                    metadata = {**body["metadata"], **revision}
                    self._cluster.patch(door.KIND, name, {**body, "metadata": metadata})
        self._seen = wanted
        return self._cluster.poll(
            door.KIND, name, door.url, timeout_s=ROUTER_S, interval_s=POLL_S, late=lambda: ""
        )

    def retire(self, model: str, keep: set[str]) -> None:
        """Delete the InferenceServices of other versions, once nothing is under way on them."""
        for version, service in self._services(model):
            if version not in keep:
                self._check()
                self._drain(service)
                self._cluster.delete(SERVICE, _name(service), service["metadata"]["uid"])

    def _check(self) -> None:
        if self._lease:
            self._lease.check()

    def _weights(self, model: str) -> dict[str, int]:
        found = self._found(model)
        return self._door.weights(found) if found else {}

    def _found(self, model: str) -> dict[str, Any] | None:
        kind, name = self._door.KIND, objects.endpoint_name(model)
        found = self._cluster.get(kind, name)
        if of_another(found, model):
            raise UserError(
                f"there is a {kind.name} {name} that does not belong to {model}; rename or delete "
                "it"
            )
        return found

    def _services(self, model: str) -> list[tuple[str, dict[str, Any]]]:
        """Every version's name and InferenceService."""
        return [
            (service["metadata"]["annotations"][objects.VERSION], service)
            for service in self._cluster.list(SERVICE, objects.owned(model))
        ]

    def _server(self, address: str) -> Server:
        token = self._cluster.token() if self._settings.kserve.authentication else ""
        return Server(address, token, settles_s=ROUTER_S)

    def _judge(self, service: dict[str, Any] | None) -> str | None:
        """The address of an InferenceService that serves what was asked for; None if not yet."""
        if service is None:
            raise UserError("the InferenceService was deleted by somebody else; run this again")
        if _blocked(service):
            raise UserError(
                f"{service['metadata']['annotations']['openshift.io/display-name']} does not "
                f"start: {_failure(service)}\n{self._why(service)}".rstrip()
            )
        if _serves(service):
            return self._address(service)
        why = self._why(service)
        if any(reason in why for reason in STUCK):
            raise UserError(f"{_name(service)} does not start: {why}")
        return None

    def _address(self, service: dict[str, Any]) -> str:
        """Where a version answers by itself: inside a cluster with a Gateway its Service, for there
        the outer name of each version need not lead anywhere."""
        status = service["status"]
        inside = (status.get("address") or {}).get("url")
        here = self._settings.kserve.gateway and kube.NAMESPACE_FILE.is_file()
        return str(inside if here and inside else status["url"])

    def _why(self, service: dict[str, Any]) -> str:
        labels = {"serving.kserve.io/inferenceservice": _name(service)}
        return pods.why(self._cluster, labels, service)

    def _remove(self, service: dict[str, Any]) -> None:
        self._cluster.delete(SERVICE, _name(service), service["metadata"]["uid"])
        uid = service["metadata"]["uid"]
        self._cluster.poll(
            SERVICE,
            _name(service),
            lambda found: True if found is None or found["metadata"]["uid"] != uid else None,
            timeout_s=self._settings.kserve.start_timeout_s,
            interval_s=POLL_S,
        )

    def _drain(self, service: dict[str, Any]) -> None:
        """Wait until a server has been quiet, or for as long as a request may take."""
        if not _serves(service):
            return
        server = self._server(self._address(service))
        deadline = time.monotonic() + self._settings.kserve.request_timeout_s
        quiet_since = time.monotonic()
        with server.client(timeout_s=10.0) as client:
            while time.monotonic() < min(deadline, quiet_since + QUIET_S):
                if _under_way(client) != 0:
                    quiet_since = time.monotonic()
                time.sleep(1.0)


def _under_way(client: Any) -> int | None:
    """The requests that vLLM runs or holds back now; None if it does not say."""
    import httpx

    try:
        answer = client.get("/metrics").raise_for_status()
    except httpx.HTTPError:
        return None
    counted = [
        float(line.rpartition(" ")[2])
        for line in answer.text.splitlines()
        if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting"))
    ]
    return int(sum(counted)) if counted else None


def _serves(service: dict[str, Any]) -> bool:
    """Whether KServe says that this generation is loaded and ready.

    Ready alone is not enough: it has been seen True while pods crash
    (https://github.com/kserve/kserve/issues/1859).
    """
    status = service.get("status") or {}
    if status.get("observedGeneration", 0) < service["metadata"].get("generation", 0):
        return False
    model = status.get("modelStatus") or {}
    ready = kube.condition(service, "Ready") or {}
    return bool(
        ready.get("status") == "True"
        and model.get("transitionStatus") == "UpToDate"
        and (model.get("states") or {}).get("activeModelState") == "Loaded"
        and status.get("url")
    )


def _blocked(service: dict[str, Any]) -> bool:
    status = service.get("status") or {}
    current = status.get("observedGeneration", 0) >= service["metadata"].get("generation", 0)
    return current and (status.get("modelStatus") or {}).get("transitionStatus") in BLOCKED


def _failure(service: dict[str, Any]) -> str:
    model = service["status"]["modelStatus"]
    info = model.get("lastFailureInfo") or {}
    told = [str(info[key]) for key in ("reason", "message") if info.get(key)]
    if info.get("exitCode"):
        told.append(f"(exit status {info['exitCode']})")
    return " ".join(told) or str(model["transitionStatus"])


def _same_door(found: dict[str, Any], body: dict[str, Any]) -> None:
    """Refuse to change how users come in to a version that they use now."""
    old, new = (
        service["metadata"]["annotations"].get(objects.AUTHENTICATION) for service in (found, body)
    )
    if old != new:
        raise UserError(
            f"{body['metadata']['annotations']['openshift.io/display-name']} is served with "
            f"authentication {old} and the settings say {new}: one address cannot lead to both; "
            "promote another version with the new setting, or set it back"
        )


def _name(body: dict[str, Any]) -> str:
    return str(body["metadata"]["name"])
