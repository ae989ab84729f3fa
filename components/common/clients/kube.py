"""The Kubernetes API of the cluster that a step runs in, or that a kubeconfig names.

The package `kubernetes` knows the address, the token (and its renewal) and the CA; what is asked is
plain: objects are the dicts that stand in a manifest. Nothing is watched, for the service account
of a pipeline may not; `poll` asks again instead. Requests are repeated while the server is busy or
away. A refusal is a `UserError` that says what to do; no token or CA is ever in one, or in a log.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import tenacity

from nudge.components.common.core.errors import Transient, UserError

T = TypeVar("T")
Object = dict[str, Any]

FIELD_MANAGER = "nudge"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
PATIENCE_S = 60.0
"""How long a busy or silent server is asked again, with back-off."""

LOG_PATIENCE_S = 3.0
"""The same for a log. An API server answers 500 for as long as a node's kubelet is away, and a log
is never the only way to know how a pod does."""

TIMEOUTS_S = (10.0, 60.0)
"""Of connecting, and of waiting for an answer."""

PAGE = 500
BUSY = (429, 500, 502, 503, 504)
VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class ResourceKind:
    """A kind of object: ``trainer.kubeflow.org/v1alpha1``, ``TrainJob``, ``trainjobs``.

    ``needs`` says what brings the kind to a cluster, for those that have it not.
    """

    api_version: str
    name: str
    plural: str
    needs: str = ""

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        parts = ["apis" if self.group else "api", self.api_version, "namespaces", quote(namespace)]
        return "/" + "/".join([*parts, self.plural, *(quote(p) for p in (name, subresource) if p)])


class NotInTime(Transient):
    """What was waited for has not come; ``why`` is the cause alone."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(f"{message}: {why}")
        self.why = why


POD = ResourceKind("v1", "Pod", "pods")
EVENT = ResourceKind("v1", "Event", "events")


class ResourceConflict(Exception):
    """The object exists already (``reason`` AlreadyExists) or was changed since it was read."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Busy(Exception):
    """An answer after which the same request may be sent again."""

    def __init__(self, status: int, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.status, self.wait_s = status, wait_s


class Cluster:
    """One namespace of a cluster; made by `connect`."""

    def __init__(self, api: Any, namespace: str, patience_s: float = PATIENCE_S) -> None:
        self._api, self.namespace, self.patience_s = api, namespace, patience_s

    def get(self, kind: ResourceKind, name: str) -> Object | None:
        """The object, or None if there is none of this name."""
        return self._json(kind, "GET", kind.path(self.namespace, name), name)

    def list(
        self, kind: ResourceKind, labels: Mapping[str, str] | None = None, **fields: str
    ) -> list[Any]:
        """The objects that carry all these labels and (field selectors) values."""
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = ",".join(f"{key}={value}" for key, value in labels.items())
        if fields:
            pairs = ((key.replace("__", "."), value) for key, value in fields.items())
            query["fieldSelector"] = ",".join(f"{key}={value}" for key, value in pairs)
        items: list[Any] = []
        while True:
            page = self._json(kind, "GET", kind.path(self.namespace), query=query, verb="list")
            items += page["items"] if page else []
            token = page["metadata"].get("continue") if page else None
            if not token:
                return items
            query["continue"] = token

    def create(self, kind: ResourceKind, body: Object) -> Object:
        """Create an object; raises `Conflict` if its name is taken.

        An answer may be lost after the object was made: whoever repeats this must be ready to meet
        an object of its own.
        """
        made = self._json(kind, "POST", kind.path(self.namespace), _name(body), body=body)
        return _there(made, kind, self.namespace)

    def apply(self, kind: ResourceKind, body: Object, *, force: bool = False) -> Object:
        """Create or change an object to hold what ``body`` says (server-side apply).

        Fields that an earlier apply set and ``body`` leaves out are removed. Raises `UserError`
        that names the field and its owner if somebody else set one, unless ``force``.
        """
        query = {"fieldManager": FIELD_MANAGER, "force": str(force).lower()}
        media = "application/apply-patch+yaml"
        path = kind.path(self.namespace, _name(body))
        try:
            made = self._json(kind, "PATCH", path, _name(body), query, body, media)
        except ResourceConflict as conflict:
            raise UserError(
                f"{kind.name} {_name(body)}: {conflict}; somebody else manages this field: take it "
                "out of there, or delete the object and run this again"
            ) from None
        return _there(made, kind, self.namespace)

    def patch(
        self, kind: ResourceKind, name: str, change: Object, *, subresource: str = ""
    ) -> Object:
        """Merge ``change`` into an object (JSON merge patch: None removes a key, lists replace)."""
        path = kind.path(self.namespace, name, subresource)
        query = {"fieldManager": FIELD_MANAGER}
        made = self._json(kind, "PATCH", path, name, query, change, "application/merge-patch+json")
        if made is None:
            raise UserError(f"there is no {kind.name} {name} in namespace {self.namespace}")
        return made

    def delete(self, kind: ResourceKind, name: str, uid: str = "") -> bool:
        """Delete an object and what it owns; False if it is not there, or not of this ``uid``."""
        body: Object = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            gone = self._json(kind, "DELETE", kind.path(self.namespace, name), name, body=body)
        except ResourceConflict:
            return False
        return gone is not None

    def poll(
        self,
        kind: ResourceKind,
        name: str,
        judge: Callable[[Object | None], T | None],
        *,
        timeout_s: float,
        interval_s: float = 2.0,
        late: Callable[[], str] = lambda: "",
    ) -> T:
        """Ask for an object until ``judge`` gives something; that is returned.

        ``judge`` gets None where the object is not there, and may raise. Raises `NotInTime` after
        ``timeout_s``, with what ``late`` says of the cause.
        """
        waiting = tenacity.Retrying(
            stop=tenacity.stop_after_delay(timeout_s),
            wait=tenacity.wait_fixed(interval_s),
            retry=tenacity.retry_if_result(lambda found: found is None),
        )
        try:
            return waiting(lambda: judge(self.get(kind, name)))  # type: ignore[return-value]
        except tenacity.RetryError:
            why = late() or describe(self.get(kind, name))
            what = f"{kind.name} {name} in namespace {self.namespace}"
            raise NotInTime(f"{what} is not ready after {timeout_s:g} s", why) from None

    def log(self, pod: str, container: str = "", **query: str) -> str:
        """The log of a pod's container; ``query`` as the API has it (tailLines, sinceTime, ...).

        A server that fails is asked again for `LOG_PATIENCE_S` only.
        """
        if container:
            query["container"] = container
        path = POD.path(self.namespace, pod, "log")
        patience_s = min(self.patience_s, LOG_PATIENCE_S)
        text = self._text(POD, "GET", path, pod, query, subresource="log", patience_s=patience_s)
        return text or ""

    def token(self) -> str:
        """The bearer token that this asks with; empty where it has none (client certificates)."""
        headers: dict[str, str] = {}
        self._api.update_params_for_auth(headers, [], ["BearerToken"])
        return headers.get("authorization", "").removeprefix("Bearer ")

    def preferred_version(self, group: str) -> str:
        """The version of an API group that this cluster prefers: ``kueue.x-k8s.io/v1beta2``. Empty
        if it does not serve the group."""
        kind = ResourceKind(f"{group}/", "APIGroup", "")
        text = self._text(kind, "GET", f"/apis/{group}", group, missing_is_none=True)
        return "" if text is None else str(json.loads(text)["preferredVersion"]["groupVersion"])

    def schema(self, kind: ResourceKind) -> Object | None:
        """The JSON schema that this cluster has of a kind, or None if it does not know the kind.

        Every service account may read it, whereas the CustomResourceDefinition is for few.
        """
        where = f"/openapi/v3/apis/{kind.api_version}" if kind.group else "/openapi/v3/api/v1"
        text = self._text(kind, "GET", where, missing_is_none=True)
        if text is None:
            return None
        group, _, version = kind.api_version.rpartition("/")
        wanted = {"group": group, "version": version, "kind": kind.name}
        for schema in json.loads(text)["components"]["schemas"].values():
            if wanted in schema.get("x-kubernetes-group-version-kind", []):
                return dict(schema)
        return None

    def _json(
        self,
        kind: ResourceKind,
        method: str,
        path: str,
        name: str = "",
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        media: str = "application/json",
        verb: str = "",
    ) -> Any:
        text = self._text(kind, method, path, name, query, body, media, verb)
        return None if text is None else json.loads(text)

    def _text(
        self,
        kind: ResourceKind,
        method: str,
        path: str,
        name: str = "",
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        media: str = "application/json",
        verb: str = "",
        subresource: str = "",
        missing_is_none: bool = False,
        patience_s: float | None = None,
    ) -> str | None:
        """The text of an answer, or None if the object is not there."""
        import urllib3

        where = self._api.configuration.host
        what = f"{verb or VERBS[method]} {kind.name}{f' {name}' if name else ''}"
        doing = f"{what} in namespace {self.namespace}"
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.patience_s if patience_s is None else patience_s),
            wait=_wait,
            retry=tenacity.retry_if_exception(_is_passing),
            reraise=True,
        )
        try:
            status, text = retrying(self._once, method, path, query, body, media)
        except _Busy as busy:
            raise Transient(f"{doing}: {where} answered {busy.status}: {busy}") from None
        except urllib3.exceptions.SSLError as error:
            raise UserError(
                f"{doing}: the certificate of {where} is not trusted: {error}; give its CA in the "
                "kubeconfig"
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise Transient(f"{doing}: the cluster {where} does not answer: {error}") from None
        if status < 300:
            return text
        told = _status(text)
        reason, message = told.get("reason", ""), told.get("message") or text.strip()[:500]
        if status == 404 and (missing_is_none or reason == "NotFound"):
            return None
        if status == 404:
            needs = f"; it comes with {kind.needs}" if kind.needs else ""
            raise UserError(
                f"{doing}: this cluster has no kind {kind.name} ({kind.api_version}){needs}"
            )
        if status == 409:
            raise ResourceConflict(reason, message)
        if status == 401:
            raise UserError(
                f"{doing}: {where} does not accept this token (401); log in again, or check the "
                "service account"
            )
        if status == 403 and " cannot " in message:
            raise UserError(_no_right(doing, kind, verb or VERBS[method], subresource, message))
        raise UserError(f"{doing}: {where} answered {status}: {message}")

    def _once(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        media: str,
    ) -> tuple[int, str]:
        headers = {"Accept": "application/json, */*", "Content-Type": media}
        self._api.update_params_for_auth(headers, [], ["BearerToken"])
        text = "&".join(f"{key}={quote(value, safe='')}" for key, value in (query or {}).items())
        answer = self._api.rest_client.pool_manager.request(
            method,
            f"{self._api.configuration.host}{path}{f'?{text}' if text else ''}",
            headers=headers,
            body=None if body is None else json.dumps(body),
            timeout=_timeout(),
            retries=False,
        )
        told = answer.data.decode(errors="replace")
        if answer.status in BUSY:
            wait = answer.headers.get("Retry-After", "")
            message = _status(told).get("message") or told.strip()[:500]
            raise _Busy(answer.status, message, float(wait) if wait.isdigit() else 0)
        return answer.status, told


def connect(namespace: str = "", patience_s: float = PATIENCE_S) -> Cluster:
    """The cluster of KUBECONFIG, else that of this pod's service account, else of ~/.kube/config.

    Without ``namespace`` it is that of the pod or of the kubeconfig's context. Raises `UserError`
    if there is no cluster, or no namespace.
    """
    import kubernetes.client
    import kubernetes.config

    configuration = kubernetes.client.Configuration()
    # Given each time: the package reads the variable only once, when it is imported.
    file = os.environ.get("KUBECONFIG") or None
    in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and not file
    try:
        if in_pod:
            kubernetes.config.load_incluster_config(client_configuration=configuration)
            found = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.is_file() else ""
        else:
            kubernetes.config.load_kube_config(file, client_configuration=configuration)
            context = kubernetes.config.list_kube_config_contexts(file)[1]
            found = context["context"].get("namespace", "")
    except kubernetes.config.ConfigException as error:
        raise UserError(
            f"no cluster is known here: {error}; log in (`oc login`), or set KUBECONFIG"
        ) from None
    if not (namespace or found):
        raise UserError(
            "no namespace is known: give one, or set one with `oc project <name>` or "
            "`kubectl config set-context --current --namespace=<name>`"
        )
    return Cluster(kubernetes.client.ApiClient(configuration), namespace or found, patience_s)


def condition(object: Object, type: str) -> Object | None:
    """The condition of this type, or None where nothing has set it for this generation."""
    status = object.get("status") or {}
    generation = object["metadata"].get("generation", 0)
    for found in status.get("conditions", []):
        seen = found.get("observedGeneration", status.get("observedGeneration", generation))
        if found["type"] == type and seen >= generation:
            return dict(found)
    return None


def describe(object: Object | None) -> str:
    """What an object's conditions say, in one line."""
    if object is None:
        return "it is not there"
    conditions = (object.get("status") or {}).get("conditions", [])
    told = [
        f"{found['type']}={found['status']}"
        + "".join(f" {found[key]}" for key in ("reason", "message") if found.get(key))
        for found in conditions
    ]
    return "; ".join(told) or "its controller has not said anything of it"


def _is_passing(error: BaseException) -> bool:
    import urllib3

    if isinstance(error, urllib3.exceptions.SSLError):
        return False
    return isinstance(error, _Busy | urllib3.exceptions.HTTPError)


def _wait(state: tenacity.RetryCallState) -> float:
    """Exponential with jitter, at least as long as the server asks for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait_s if isinstance(error, _Busy) else 0.0
    return max(asked, tenacity.wait_random_exponential(0.2, max=8)(state))


def _timeout() -> Any:
    import urllib3

    return urllib3.Timeout(connect=TIMEOUTS_S[0], read=TIMEOUTS_S[1])


def _name(body: Object) -> str:
    return str(body["metadata"]["name"])


def _there(made: Any, kind: ResourceKind, namespace: str) -> Object:
    if made is None:  # the API's answer to a namespace that is not there
        raise UserError(f"{kind.name}: there is no namespace {namespace}")
    return dict(made)


def _status(text: str) -> Object:
    """The Status object of a refusal, or an empty dict where the answer is something else."""
    try:
        told = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) and told.get("kind") == "Status" else {}


def _no_right(doing: str, kind: ResourceKind, verb: str, subresource: str, message: str) -> str:
    resource = kind.plural + (f"/{subresource}" if subresource else "")
    rule = {"apiGroups": [kind.group], "resources": [resource], "verbs": [verb]}
    return (
        f"{doing}: not allowed (403): {message}. Bind a Role with this rule to that account: "
        f"{json.dumps(rule)}"
    )
