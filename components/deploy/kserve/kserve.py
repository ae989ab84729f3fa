"""Serving on a cluster: one InferenceService per version (`kserve_objects`), one of the `doors` per
model."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import tenacity

from nudge.components.common.clients import kube
from nudge.components.common.clients.kube import Cluster, ResourceConflict, ResourceKind
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.kserve import objects as objects
from nudge.components.deploy.kserve import readiness
from nudge.components.deploy.kserve.lease import HeldLease, held
from nudge.components.deploy.kserve.routes import (
    GatewayRoute,
    OpenShiftRoute,
    TrafficRoute,
    of_another,
)
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer
from nudge.components.deploy.verify import check_image

SERVICE = ResourceKind(
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

SUSPECT_S = 9.0
"""How long KServe's own status must report a failure before it counts. After a change it may be
about what was there before: seen for 0.2 s after a restart; and a runtime may be a moment late."""


class KServe:
    """A `Target`: one namespace of a cluster."""

    def __init__(self, cluster: Cluster, settings: DeploySettings) -> None:
        self._cluster, self._settings = cluster, settings
        place = settings.kserve
        self._door: TrafficRoute = GatewayRoute(place) if place.gateway else OpenShiftRoute(place)
        self._lease: HeldLease | None = None
        self._seen: dict[str, int] = {}
        self._had_traffic: set[str] = set()
        self._made: set[str] = set()
        """The InferenceServices that this shift created."""
        self.environment = cluster.namespace
        self.runtime = settings.kserve.runtime

    @contextlib.contextmanager
    def exclusive(self, model: str) -> Iterator[None]:
        """Hold the model's Lease; see `nudge.components.deploy.kserve.lease`."""
        name = objects.endpoint_name(model)
        with held(self._cluster, f"nudge-{name}", objects.owned(model), LEASE_WAIT_S) as lease:
            self._lease, self._seen = lease, self._weights(model)
            self._had_traffic, self._made = set(self._seen), set()
            yield

    def live(self, model: str) -> dict[str, int]:
        """The weight of each version behind the model's door."""
        weights = self._weights(model)
        return {
            version: weights[_name(service)]
            for version, service in self._services(model)
            if _name(service) in weights
        }

    def bring_up(self, version: Version) -> ModelServer:
        """Create the version's InferenceService, or bring it up to the settings, and wait for it.

        It is ready when the wanted number of pods with these settings are Ready, no older ones
        remain, and its address answers. Raises `UserError` as soon as the pods, their ReplicaSet or
        KServe report what will not change by itself, with the end of a failed container's log.
        """
        self._check()
        body = objects.inference_service(version, self._settings)
        if version.uri.startswith("oci:"):
            check_image(version)
        name = _name(body)
        found = self._cluster.get(SERVICE, name)
        if found and name in self._seen:
            _same_door(found, body)
        elif found and ("deletionTimestamp" in found["metadata"] or self._failed(found)):
            # An earlier try may have failed for a cause that has been fixed since.
            self._remove(found)
            found = None
        if found is None:
            self._made.add(name)
        self._cluster.apply(SERVICE, body, force=True)
        start = _Start(self._cluster, body, self._address, self._server)
        address = self._cluster.poll(
            SERVICE,
            name,
            start.judge,
            timeout_s=self._settings.kserve.start_timeout_s,
            interval_s=POLL_S,
            late=start.late,
        )
        return self._server(address)

    def make_room(self, model: str, wanted: set[str]) -> bool:
        """As in `Target`, if the settings ask for it and something wanted does not run yet."""
        if not self._settings.kserve.stop_old_first:
            return False
        services = dict(self._services(model))
        up = {version for version, service in services.items() if self._ready(service)}
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
            retry=tenacity.retry_if_exception_type(ResourceConflict),
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
        self._had_traffic |= set(wanted)
        return self._cluster.poll(
            door.KIND, name, door.url, timeout_s=ROUTER_S, interval_s=POLL_S, late=lambda: ""
        )

    def retire(self, model: str, keep: set[str]) -> None:
        """Delete the InferenceServices of other versions, once nothing is under way on them.

        Only a version that had traffic is waited for; one that failed before it had any goes now.
        """
        going = [each for each in self._services(model) if each[0] not in keep]
        # Those that nobody waits for first: what failed must not stay while an old one drains.
        for version, service in sorted(going, key=lambda each: self._may_be_busy(each[1])):
            self._check()
            if self._may_be_busy(service):
                self._drain(version, service)
            self._cluster.delete(SERVICE, _name(service), service["metadata"]["uid"])

    def _may_be_busy(self, service: dict[str, Any]) -> bool:
        """False for what this shift made and gave no traffic. What a killed shift left may have
        had some."""
        return _name(service) in self._had_traffic or _name(service) not in self._made

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

    def _server(self, address: str) -> ModelServer:
        """Where a version answers, with this account's token if it asks for one.

        Raises `UserError` where the token would cross a network in plain text.
        """
        token = self._cluster.token() if self._settings.kserve.authentication else ""
        url = urlsplit(address)
        if token and url.scheme != "https" and url.hostname not in ("127.0.0.1", "::1"):
            raise UserError(
                f"{address} asks for a token, which is sent over https only; serve it with TLS, or "
                "set deploy.kserve.authentication: false"
            )
        return ModelServer(address, token, settles_s=ROUTER_S)

    def _ready(self, service: dict[str, Any]) -> bool:
        return readiness.look(self._cluster, service, readiness.digest_of(service)).ready

    def _failed(self, service: dict[str, Any]) -> bool:
        found = readiness.look(self._cluster, service, readiness.digest_of(service))
        return bool(found.failed or found.suspect)

    def _address(self, service: dict[str, Any]) -> str:
        """Where a version answers by itself: inside a cluster with a Gateway its Service, for there
        the outer name of each version need not lead anywhere."""
        status = service["status"]
        inside = (status.get("address") or {}).get("url")
        here = self._settings.kserve.gateway and kube.NAMESPACE_FILE.is_file()
        return str(inside if here and inside else status["url"])

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

    def _drain(self, version: str, service: dict[str, Any]) -> None:
        """Wait until a server has been quiet, or for as long as a request may take."""
        if not (service.get("status") or {}).get("url"):
            return
        if not readiness.some_ready(self._cluster, service):
            return
        server = self._server(self._address(service))
        longest_s = self._settings.kserve.request_timeout_s
        started = quiet_since = time.monotonic()
        announced = False
        with server.client(timeout_s=10.0) as client:
            while time.monotonic() < min(started + longest_s, quiet_since + QUIET_S):
                count = _under_way(client)
                if count:  # what does not say how much is under way (None) is not known to be busy
                    quiet_since = time.monotonic()
                    if not announced:
                        say(f"{version} ends when its {count} requests do, or in {longest_s} s")
                        announced = True
                time.sleep(1.0)


class _Start:
    """The wait for one version: what it reports meanwhile, and what ends it."""

    def __init__(
        self,
        cluster: Cluster,
        body: dict[str, Any],
        address: Callable[[dict[str, Any]], str],
        server: Callable[[str], ModelServer],
    ) -> None:
        self._cluster, self._address, self._server = cluster, address, server
        self._name, self._digest = _name(body), readiness.digest_of(body)
        self._title = body["metadata"]["annotations"]["openshift.io/display-name"]
        self._said = ""
        self._suspected_since = self._ready_since = 0.0
        self._started_again = False
        self._silent = ""

    def judge(self, service: dict[str, Any] | None) -> str | None:
        """The version's address if it is ready, None if not yet; raises `UserError` if never."""
        if service is None:
            raise UserError("the InferenceService was deleted by somebody else; run this again")
        self._start_if_stopped(service)
        found = readiness.look(self._cluster, service, self._digest)
        if found.failed:
            raise self._failure(service, found.failed)
        now = time.monotonic()
        if not found.suspect:
            self._suspected_since = 0.0
        elif not self._suspected_since:
            self._suspected_since = now
        elif now - self._suspected_since >= SUSPECT_S:
            raise self._failure(service, found.suspect)
        if found.waiting and found.waiting != self._said:
            self._said = found.waiting
            say(f"{self._title} waits: {found.waiting}")
        if not found.ready:
            self._ready_since = 0.0
            return None
        self._ready_since = self._ready_since or now
        return self._answering(service)

    def late(self) -> str:
        """Everything that is known about a version that is not ready in time."""
        service = self._cluster.get(SERVICE, self._name)
        if service is None:
            return "it is not there"
        return "\n".join(
            filter(None, [readiness.why(self._cluster, service, self._digest), self._silent])
        )

    def _start_if_stopped(self, service: dict[str, Any]) -> None:
        if (service["metadata"].get("annotations") or {}).get(objects.STOP) != "true":
            return
        if self._started_again:
            raise UserError(
                f"{self._title} was stopped by somebody while it started (annotation "
                f"{objects.STOP}); run this again when it may be served"
            )
        self._started_again = True
        say(f"{self._title} had been stopped by somebody (annotation {objects.STOP}); starting it")
        change = {"metadata": {"annotations": {objects.STOP: None}}}
        self._cluster.patch(SERVICE, _name(service), change)

    def _answering(self, service: dict[str, Any]) -> str | None:
        """The address of a version whose pods are ready, once something answers there."""
        import httpx

        if not (service.get("status") or {}).get("url"):
            return None
        address = self._address(service)
        try:
            with self._server(address).client(timeout_s=10.0) as client:
                answered = client.get("/health").status_code
            if answered not in (502, 503, 504):
                return address
            self._silent = f"its pods are ready, but {address} answers {answered}"
        except httpx.TransportError as error:
            self._silent = f"its pods are ready, but {address} does not answer: {error}"
        if time.monotonic() - self._ready_since > ROUTER_S:
            raise UserError(f"{self._title}: {self._silent}")
        return None

    def _failure(self, service: dict[str, Any], why: str) -> UserError:
        old = ""
        if readiness.some_ready(self._cluster, service):
            old = (
                "\nThe pods with the earlier settings still serve; set them back and run this again"
            )
        return UserError(f"{self._title} does not start: {why}{old}")


def say(line: str) -> None:
    """Show whoever follows the step or command what it waits for."""
    print(f"deploy: {line}", file=sys.stderr, flush=True)


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
