"""Serving on KServe: one InferenceService per version, and one route per model (see `routes`)."""

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import tenacity

from nudge.components.common.clients import kube
from nudge.components.common.clients.kube import Cluster, ResourceConflict
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.kserve import lifecycle, objects, readiness, routes
from nudge.components.deploy.kserve.lease import HeldLease, hold_lease
from nudge.components.deploy.kserve.objects import INFERENCE_SERVICE
from nudge.components.deploy.kserve.routes import GatewayRoute, OpenShiftRoute, TrafficRoute
from nudge.components.deploy.measure import Counts
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.smoke import ModelServer
from nudge.components.deploy.verify import check_image

POLL_S = 3.0
LEASE_WAIT_S = 90.0
"""Longer than a killed holder's Lease lasts, so that running the same command again is enough."""


class KServe:
    """A `Target`: one namespace of a cluster."""

    def __init__(self, cluster: Cluster, settings: DeploySettings) -> None:
        self._cluster, self._settings = cluster, settings
        kserve = settings.kserve
        self._route: TrafficRoute = (
            GatewayRoute(kserve) if kserve.gateway else OpenShiftRoute(kserve)
        )
        self._lease: HeldLease | None = None
        self._seen: dict[str, int] = {}
        """The route's weights as this shift last read or wrote them."""
        self._had_traffic: set[str] = set()
        self._created: set[str] = set()
        """The InferenceServices that this shift created."""
        self.environment = cluster.namespace
        self.runtime = settings.kserve.runtime

    @contextlib.contextmanager
    def exclusive(self, model: str) -> Iterator[None]:
        """Hold the model's Lease; see `nudge.components.deploy.kserve.lease`."""
        name = f"nudge-{objects.endpoint_name(model)}"
        with hold_lease(self._cluster, name, objects.owned(model), LEASE_WAIT_S) as lease:
            self._lease, self._seen = lease, self._weights(model)
            self._had_traffic, self._created = set(self._seen), set()
            yield

    def live(self, model: str) -> dict[str, int]:
        """The weight of each version behind the model's route."""
        weights = self._weights(model)
        return {
            version: weights[_name(service)]
            for version, service in self._services(model)
            if _name(service) in weights
        }

    def bring_up(self, version: Version) -> ModelServer:
        """Create the version's InferenceService, or update it to the settings, and wait for it.

        It is ready when the wanted number of pods with these settings are Ready, no older ones
        remain, and its address answers. Raises `UserError` as soon as the pods, their ReplicaSet or
        KServe report something that will not resolve itself, with the end of a failed container's
        log.
        """
        self._check_lease()
        body = objects.inference_service(version, self._settings)
        if version.uri.startswith("oci:"):
            check_image(version)
        name = _name(body)
        existing = self._cluster.get(INFERENCE_SERVICE, name)
        if existing and name in self._seen:
            _check_same_authentication(existing, body)
        elif existing and ("deletionTimestamp" in existing["metadata"] or self._failed(existing)):
            # An earlier try may have failed for a cause that has been fixed since.
            self._remove(existing)
            existing = None
        if existing is None:
            self._created.add(name)
        self._cluster.apply(INFERENCE_SERVICE, body, force=True)
        start = lifecycle.Start(self._cluster, body, self._address, self._server)
        address = self._cluster.poll(
            INFERENCE_SERVICE,
            name,
            start.judge,
            timeout_s=self._settings.kserve.start_timeout_s,
            interval_s=POLL_S,
            late=start.late,
        )
        return self._server(address)

    def make_room(self, model: str, wanted: set[str]) -> bool:
        """As in `Target`, if the settings ask for it and a wanted version does not run yet."""
        if not self._settings.kserve.stop_old_first:
            return False
        services = dict(self._services(model))
        up = {version for version, service in services.items() if self._ready(service)}
        leaving = services.keys() - wanted
        if wanted <= up or not leaving:
            return False
        live = self.live(model)
        if live.keys() & leaving:
            staying = {each: live[each] for each in live.keys() & wanted}
            self.move(model, staying or dict.fromkeys(live, 0))
        self.retire(model, wanted)
        return True

    def move(self, model: str, shares: dict[str, int]) -> str:
        """Set these weights on the model's route, in one request; returns its URL.

        Raises `UserError` if someone else changed them since this shift began.
        """
        route, body = self._route, self._route.body(model, shares)
        name, wanted = _name(body), route.weights(body)
        for attempt in tenacity.Retrying(
            stop=tenacity.stop_after_delay(routes.ROUTER_S),
            wait=tenacity.wait_fixed(0.2),
            retry=tenacity.retry_if_exception_type(ResourceConflict),
        ):
            with attempt:
                self._check_lease()
                existing = self._existing_route(model)
                weights = route.weights(existing) if existing else {}
                if weights not in (self._seen, wanted):
                    raise UserError(
                        f"someone else changed the {route.KIND.name} {name} meanwhile; run this "
                        "again"
                    )
                if existing is None:
                    self._cluster.create(route.KIND, body)
                else:
                    # A Route's spec is changed by a patch: not every release of OpenShift accepts a
                    # server-side apply for it. The router's own status updates change the revision
                    # as well, so after a conflict the route is read again.
                    revision = {"resourceVersion": existing["metadata"]["resourceVersion"]}
                    metadata = {**body["metadata"], **revision}
                    self._cluster.patch(route.KIND, name, {**body, "metadata": metadata})
        self._seen = wanted
        self._had_traffic |= set(wanted)
        return self._cluster.poll(
            route.KIND, name, route.url, timeout_s=routes.ROUTER_S, interval_s=POLL_S
        )

    def retire(self, model: str, keep: set[str]) -> None:
        """Delete the InferenceServices of other versions, once they have no request in flight.

        Only a version that had traffic is drained; one that failed before it had any is deleted at
        once.
        """
        leaving = [each for each in self._services(model) if each[0] not in keep]
        # Those that need no draining first: a failed version must not stay while an old one drains.
        for version, service in sorted(leaving, key=lambda each: self._may_be_busy(each[1])):
            self._check_lease()
            if self._may_be_busy(service):
                self._drain(version, service)
            self._cluster.delete(INFERENCE_SERVICE, _name(service), service["metadata"]["uid"])

    def counts(self, model: str, version: str) -> Counts | None:
        """The requests that vLLM counted; None for more than one replica, of which each counts its
        own and any may answer."""
        service = dict(self._services(model)).get(version)
        if service is None or self._settings.kserve.replicas != 1:
            return None
        with self._server(self._address(service)).client(timeout_s=10.0) as client:
            return lifecycle.requests_answered(client)

    def _may_be_busy(self, service: dict[str, Any]) -> bool:
        """False for a service that this shift created and gave no traffic. One that a killed shift
        left behind may have had some."""
        return _name(service) in self._had_traffic or _name(service) not in self._created

    def _check_lease(self) -> None:
        if self._lease:
            self._lease.check()

    def _weights(self, model: str) -> dict[str, int]:
        existing = self._existing_route(model)
        return self._route.weights(existing) if existing else {}

    def _existing_route(self, model: str) -> dict[str, Any] | None:
        kind, name = self._route.KIND, objects.endpoint_name(model)
        existing = self._cluster.get(kind, name)
        if routes.belongs_to_another(existing, model):
            raise UserError(
                f"the namespace has a {kind.name} {name} that does not belong to {model}; rename "
                "or delete it"
            )
        return existing

    def _services(self, model: str) -> list[tuple[str, dict[str, Any]]]:
        """Every version's name and InferenceService."""
        return [
            (service["metadata"]["annotations"][objects.VERSION], service)
            for service in self._cluster.list(INFERENCE_SERVICE, objects.owned(model))
        ]

    def _server(self, address: str) -> ModelServer:
        """Where a version answers, with this account's token if the settings ask for one.

        Raises `UserError` if the token would cross a network in plain text.
        """
        token = self._cluster.token() if self._settings.kserve.authentication else ""
        url = urlsplit(address)
        if token and url.scheme != "https" and url.hostname not in ("127.0.0.1", "::1"):
            raise UserError(
                f"{address} asks for a token, which is sent over https only; serve it with TLS, or "
                "set deploy.kserve.authentication: false"
            )
        return ModelServer(address, token, router_delay_s=routes.ROUTER_S)

    def _ready(self, service: dict[str, Any]) -> bool:
        return readiness.look(self._cluster, service, readiness.digest_of(service)).ready

    def _failed(self, service: dict[str, Any]) -> bool:
        finding = readiness.look(self._cluster, service, readiness.digest_of(service))
        return bool(finding.failed or finding.suspect)

    def _address(self, service: dict[str, Any]) -> str:
        """Where a version itself answers. Inside a cluster with a Gateway that is its Service,
        because the external name of a single version may not be reachable there."""
        status = service["status"]
        internal = (status.get("address") or {}).get("url")
        in_cluster = self._settings.kserve.gateway and kube.NAMESPACE_FILE.is_file()
        return str(internal if in_cluster and internal else status["url"])

    def _remove(self, service: dict[str, Any]) -> None:
        uid = service["metadata"]["uid"]
        self._cluster.delete(INFERENCE_SERVICE, _name(service), uid)
        self._cluster.poll(
            INFERENCE_SERVICE,
            _name(service),
            lambda left: True if left is None or left["metadata"]["uid"] != uid else None,
            timeout_s=self._settings.kserve.start_timeout_s,
            interval_s=POLL_S,
        )

    def _drain(self, version: str, service: dict[str, Any]) -> None:
        """Wait until a server has been quiet, or for as long as a request may take."""
        if not (service.get("status") or {}).get("url"):
            return
        if not readiness.some_ready(self._cluster, service):
            return
        longest_s = self._settings.kserve.request_timeout_s
        lifecycle.wait_until_quiet(self._server(self._address(service)), version, longest_s)


def _check_same_authentication(existing: dict[str, Any], body: dict[str, Any]) -> None:
    """Refuse to change the authentication of a version that users are sent to."""
    old, new = (
        service["metadata"]["annotations"].get(objects.AUTHENTICATION)
        for service in (existing, body)
    )
    if old != new:
        raise UserError(
            f"{body['metadata']['annotations']['openshift.io/display-name']} is served with "
            f"authentication {old} and the settings say {new}: one address cannot lead to both; "
            "promote another version with the new setting, or set it back"
        )


def _name(body: dict[str, Any]) -> str:
    return str(body["metadata"]["name"])
