"""The address of a model on a cluster, and each version's share of the requests to it.

An OpenShift Route or, on a cluster with the Gateway API, an HTTPRoute. Both change all shares in
one request, and keep their address whatever is behind it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from nudge.components.common.clients.kube import ResourceKind
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.kserve.objects import MODEL, Object, endpoint_name, owned, service_name
from nudge.components.deploy.settings import KServeSettings

HTTP_PORT, AUTHENTICATED_PORT = 8080, 8443
"""Ports of a version's pods: vLLM's, and that of the proxy in front of it that checks tokens."""
SERVICE_PORT = 80
"""Port of the Service that KServe creates for a version."""

ROUTER_S = 60.0
"""How long a router may take to follow a change of a route."""

MAX_BACKENDS = 4
"""A Route has one backend and at most three alternate ones."""


class TrafficRoute(Protocol):
    """The kind of object behind a model's address."""

    KIND: ResourceKind

    def body(self, model: str, shares: Mapping[str, int]) -> Object:
        """The object with these shares; if all are 0, nothing answers at the address."""

    def weights(self, route: Object) -> dict[str, int]:
        """The weight of each InferenceService behind the route, without those whose weight is 0."""

    def url(self, route: Object | None) -> str | None:
        """The address once the route is admitted; raises `UserError` if it is refused."""


class OpenShiftRoute:
    """An OpenShift Route."""

    KIND = ResourceKind(
        "route.openshift.io/v1",
        "Route",
        "routes",
        "OpenShift; elsewhere set deploy.kserve.gateway to a Gateway to use instead",
    )

    def __init__(self, kserve: KServeSettings) -> None:
        self._kserve = kserve

    def body(self, model: str, shares: Mapping[str, int]) -> Object:
        """As in `TrafficRoute`; raises `UserError` for more than `MAX_BACKENDS` shares."""
        kserve = self._kserve
        if len(shares) > MAX_BACKENDS:
            raise UserError(
                f"the traffic of {model} would be split among {len(shares)} versions, but a Route "
                f"takes at most {MAX_BACKENDS}; split it among fewer"
            )
        first, *others = (
            {"kind": "Service", "name": _backend(model, version), "weight": share}
            for version, share in shares.items()
        )
        annotations = {
            "openshift.io/display-name": model,
            "haproxy.router.openshift.io/timeout": f"{kserve.request_timeout_s}s",
            # By request, not by client: a cookie would keep clients on a version that is gone.
            "haproxy.router.openshift.io/disable_cookies": "true",
            "haproxy.router.openshift.io/balance": "roundrobin",
        }
        spec = {
            "to": first,
            "alternateBackends": others,
            # A number, because a port name is looked up in each Service separately.
            "port": {"targetPort": AUTHENTICATED_PORT if kserve.authentication else HTTP_PORT},
            "tls": {
                "termination": "reencrypt" if kserve.authentication else "edge",
                "insecureEdgeTerminationPolicy": "Redirect",
            },
            "wildcardPolicy": "None",
        }
        return _object(self.KIND, model, annotations, spec)

    def weights(self, route: Object) -> dict[str, int]:
        spec = route["spec"]
        return _shared([spec["to"], *(spec.get("alternateBackends") or [])], 100)

    def url(self, route: Object | None) -> str | None:
        for ingress in ((route or {}).get("status") or {}).get("ingress", []):
            for condition in ingress.get("conditions", []):
                if condition["type"] != "Admitted":
                    continue
                if condition["status"] == "True":
                    return f"https://{ingress['host']}"
                raise UserError(f"the router refuses the Route {_name(route)}: {_why(condition)}")
        return None


class GatewayRoute:
    """An HTTPRoute of a Gateway (https://gateway-api.sigs.k8s.io/api-types/httproute/)."""

    KIND = ResourceKind(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        "httproutes",
        "the Gateway API (https://gateway-api.sigs.k8s.io) and a controller for it",
    )

    def __init__(self, kserve: KServeSettings) -> None:
        self._kserve = kserve

    def body(self, model: str, shares: Mapping[str, int]) -> Object:
        namespace, _, gateway = self._kserve.gateway.partition("/")
        backends = [
            {"name": _backend(model, version), "port": SERVICE_PORT, "weight": share}
            for version, share in shares.items()
        ]
        rule = {
            "backendRefs": backends,
            "timeouts": {"request": f"{self._kserve.request_timeout_s}s"},
        }
        spec = {
            "parentRefs": [{"namespace": namespace, "name": gateway}],
            "hostnames": [self._url(model).rpartition("/")[2].partition(":")[0]],
            "rules": [rule],
        }
        return _object(self.KIND, model, {}, spec)

    def weights(self, route: Object) -> dict[str, int]:
        rules = route["spec"].get("rules") or []
        return _shared([each for rule in rules for each in rule.get("backendRefs") or []], 1)

    def url(self, route: Object | None) -> str | None:
        generation = route["metadata"].get("generation", 0) if route else 0
        for parent in ((route or {}).get("status") or {}).get("parents", []):
            conditions = {
                condition["type"]: condition
                for condition in parent.get("conditions", [])
                if condition.get("observedGeneration", 0) >= generation
            }
            accepted, resolved = (conditions.get(name) for name in ("Accepted", "ResolvedRefs"))
            if accepted and accepted["status"] == "False":
                raise UserError(
                    f"the Gateway {self._kserve.gateway} refuses the HTTPRoute {_name(route)}: "
                    f"{_why(accepted)}"
                )
            if accepted and resolved and resolved["status"] == "True":
                return self._url(str((route or {})["metadata"]["annotations"][MODEL]))
        return None

    def _url(self, model: str) -> str:
        return self._kserve.gateway_url.replace("{model}", endpoint_name(model))


def belongs_to_another(route: Object | None, model: str) -> bool:
    """Whether a route with the model's name exists that does not belong to this model."""
    return bool(route and (route["metadata"].get("annotations") or {}).get(MODEL) != model)


def _object(kind: ResourceKind, model: str, annotations: dict[str, str], spec: Object) -> Object:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": {
            "name": endpoint_name(model),
            "labels": owned(model),
            "annotations": {MODEL: model, **annotations},
        },
        "spec": spec,
    }


def _backend(model: str, version: str) -> str:
    return f"{service_name(model, version)}-predictor"


def _shared(backends: list[dict[str, Any]], default: int) -> dict[str, int]:
    return {
        backend["name"].removesuffix("-predictor"): backend.get("weight", default)
        for backend in backends
        if backend.get("weight", default)
    }


def _name(route: Object | None) -> str:
    return str((route or {"metadata": {"name": ""}})["metadata"]["name"])


def _why(condition: dict[str, Any]) -> str:
    return f"{condition.get('reason', '')} {condition.get('message', '')}".strip()
