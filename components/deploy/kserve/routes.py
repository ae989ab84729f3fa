"""The address of a model on a cluster, and each version's share of the requests that come there.

An OpenShift Route, or, where there is a Gateway API, an HTTPRoute. Both change all shares in one
request, and keep their address whatever stands behind it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from nudge.components.common.clients.kube import ResourceKind
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.kserve.objects import MODEL, Object, endpoint_name, owned, service_name
from nudge.components.deploy.settings import KServeSettings

HTTP_PORT, AUTHENTICATED_PORT = 8080, 8443
"""Ports of a version's pods: vLLM's, and that of the proxy that checks tokens before it."""
SERVICE_PORT = 80
"""Of the Service that KServe makes of a version."""

MAX_BACKENDS = 4
"""A Route has one backend and at most three alternate ones."""


class TrafficRoute(Protocol):
    """What a model's address is made of."""

    KIND: ResourceKind

    def body(self, model: str, shares: Mapping[str, int]) -> Object:
        """The object with these shares; all of them 0 is an address where nobody answers."""

    def weights(self, door: Object) -> dict[str, int]:
        """The requests' weight of each InferenceService behind it, without those that get none."""

    def url(self, door: Object | None) -> str | None:
        """The address once requests come in there; raises `UserError` if they never will."""


class OpenShiftRoute:
    """An OpenShift Route."""

    KIND = ResourceKind(
        "route.openshift.io/v1",
        "Route",
        "routes",
        "OpenShift; elsewhere deploy.kserve.gateway names a Gateway to take in its place",
    )

    def __init__(self, place: KServeSettings) -> None:
        self._place = place

    def body(self, model: str, shares: Mapping[str, int]) -> Object:
        """As in `Door`; raises `UserError` if there are too many shares."""
        place = self._place
        if len(shares) > MAX_BACKENDS:
            raise UserError(
                f"{len(shares)} versions are to share the traffic of {model}; "
                f"a Route takes at most {MAX_BACKENDS}"
            )
        first, *others = (
            {"kind": "Service", "name": _backend(model, version), "weight": share}
            for version, share in shares.items()
        )
        annotations = {
            "openshift.io/display-name": model,
            "haproxy.router.openshift.io/timeout": f"{place.request_timeout_s}s",
            # By request, not by client: a cookie would hold clients on a version that has gone.
            "haproxy.router.openshift.io/disable_cookies": "true",
            "haproxy.router.openshift.io/balance": "roundrobin",
        }
        spec = {
            "to": first,
            "alternateBackends": others,
            # A number, because named ports are looked up in each Service by itself.
            "port": {"targetPort": AUTHENTICATED_PORT if place.authentication else HTTP_PORT},
            "tls": {
                "termination": "reencrypt" if place.authentication else "edge",
                "insecureEdgeTerminationPolicy": "Redirect",
            },
            "wildcardPolicy": "None",
        }
        return _object(self.KIND, model, annotations, spec)

    def weights(self, door: Object) -> dict[str, int]:
        spec = door["spec"]
        return _shared([spec["to"], *(spec.get("alternateBackends") or [])], 100)

    def url(self, door: Object | None) -> str | None:
        for ingress in ((door or {}).get("status") or {}).get("ingress", []):
            for told in ingress.get("conditions", []):
                if told["type"] == "Admitted" and told["status"] == "True":
                    return f"https://{ingress['host']}"
                if told["type"] == "Admitted":
                    raise UserError(f"the router refuses the Route {_name(door)}: {_why(told)}")
        return None


class GatewayRoute:
    """An HTTPRoute of a Gateway (https://gateway-api.sigs.k8s.io/api-types/httproute/)."""

    KIND = ResourceKind(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        "httproutes",
        "the Gateway API (https://gateway-api.sigs.k8s.io) and a controller for it",
    )

    def __init__(self, place: KServeSettings) -> None:
        self._place = place

    def body(self, model: str, shares: Mapping[str, int]) -> Object:
        namespace, _, gateway = self._place.gateway.partition("/")
        backends = [
            {"name": _backend(model, version), "port": SERVICE_PORT, "weight": share}
            for version, share in shares.items()
        ]
        rule = {
            "backendRefs": backends,
            "timeouts": {"request": f"{self._place.request_timeout_s}s"},
        }
        spec = {
            "parentRefs": [{"namespace": namespace, "name": gateway}],
            "hostnames": [self._url(model).rpartition("/")[2].partition(":")[0]],
            "rules": [rule],
        }
        return _object(self.KIND, model, {}, spec)

    def weights(self, door: Object) -> dict[str, int]:
        rules = door["spec"].get("rules") or []
        return _shared([each for rule in rules for each in rule.get("backendRefs") or []], 1)

    def url(self, door: Object | None) -> str | None:
        generation = door["metadata"].get("generation", 0) if door else 0
        for parent in ((door or {}).get("status") or {}).get("parents", []):
            conditions = {
                told["type"]: told
                for told in parent.get("conditions", [])
                if told.get("observedGeneration", 0) >= generation
            }
            accepted, resolved = (conditions.get(name) for name in ("Accepted", "ResolvedRefs"))
            if accepted and accepted["status"] == "False":
                raise UserError(
                    f"the Gateway {self._place.gateway} refuses the HTTPRoute {_name(door)}: "
                    f"{_why(accepted)}"
                )
            if accepted and resolved and resolved["status"] == "True":
                return self._url(str((door or {})["metadata"]["annotations"][MODEL]))
        return None

    def _url(self, model: str) -> str:
        return self._place.gateway_url.replace("{model}", endpoint_name(model))


def of_another(door: Object | None, model: str) -> bool:
    """Whether an object of the model's name stands there that does not belong to it."""
    return bool(door and (door["metadata"].get("annotations") or {}).get(MODEL) != model)


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


def _name(door: Object | None) -> str:
    return str((door or {"metadata": {"name": ""}})["metadata"]["name"])


def _why(condition: dict[str, Any]) -> str:
    return f"{condition.get('reason', '')} {condition.get('message', '')}".strip()
