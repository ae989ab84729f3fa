"""The Kubernetes API of the cluster that a step runs in, or that a kubeconfig names.

The package `kubernetes` knows the address, the token (and its renewal) and the CA. Objects are
plain dicts, as in a manifest. The service account of a pipeline may not watch, so `poll` asks
repeatedly instead.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tenacity

from nudge.components.common.clients.kube_requests import PATIENCE_S, Object, Requests
from nudge.components.common.clients.kube_requests import NoSuchKind as NoSuchKind
from nudge.components.common.clients.kube_requests import ResourceConflict as ResourceConflict
from nudge.components.common.clients.kube_requests import ResourceKind as ResourceKind
from nudge.components.common.core.environment import SERVICE_ACCOUNT, in_pod
from nudge.components.common.core.errors import Transient, UserError

T = TypeVar("T")

FIELD_MANAGER = "nudge"
NAMESPACE_FILE = SERVICE_ACCOUNT / "namespace"

LOG_PATIENCE_S = 3.0
"""How long to retry reading a log. An API server answers 500 while a node's kubelet is away, and a
log is never the only source for the state of a pod."""

PAGE = 500

POD = ResourceKind("v1", "Pod", "pods")
EVENT = ResourceKind("v1", "Event", "events")
REVIEW = ResourceKind(
    "authentication.k8s.io/v1", "SelfSubjectReview", "selfsubjectreviews", namespaced=False
)
ACCESS = ResourceKind(
    "authorization.k8s.io/v1",
    "SelfSubjectAccessReview",
    "selfsubjectaccessreviews",
    namespaced=False,
)
"""Both belong to no namespace, and every account may create them."""


class NotInTime(Transient):
    """An object did not reach the expected state in time; ``why`` is the cause alone."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(f"{message}: {why}")
        self.why = why


class Cluster:
    """One namespace of a cluster; created by `connect`."""

    def __init__(self, requests: Requests, namespace: str) -> None:
        self.requests, self.namespace = requests, namespace

    def get(self, kind: ResourceKind, name: str) -> Object | None:
        """The object, or None if there is none of this name."""
        found: Object | None = self.requests.json(kind, "get", name)
        return found

    def subresource(
        self, kind: ResourceKind, name: str, part: str, patience_s: float, **query: str
    ) -> Object | None:
        """A subresource of an object; None if the cluster lacks the object or this kind."""
        found: Object | None = self.requests.json(
            kind,
            "get",
            name,
            subresource=part,
            query_params=list(query.items()),
            missing_is_none=True,
            patience_s=patience_s,
        )
        return found

    def list(
        self, kind: ResourceKind, labels: Mapping[str, str] | None = None, **fields: str
    ) -> list[Any]:
        """The objects that have all these labels and field values (``metadata__name="x"``)."""
        query: dict[str, Any] = {"limit": PAGE}
        if labels:
            query["label_selector"] = ",".join(f"{key}={value}" for key, value in labels.items())
        if fields:
            pairs = ((key.replace("__", "."), value) for key, value in fields.items())
            query["field_selector"] = ",".join(f"{key}={value}" for key, value in pairs)
        items: list[Any] = []
        while True:
            page = self.requests.json(kind, "get", verb="list", **query)
            items += page["items"] if page else []
            token = page["metadata"].get("continue") if page else None
            if not token:
                return items
            query["_continue"] = token

    def create(self, kind: ResourceKind, body: Object, *, dry_run: bool = False) -> Object:
        """Create an object; raises `ResourceConflict` if its name is taken.

        The answer may be lost after the object was created, so a caller that repeats this must
        expect to find its own object. With ``dry_run`` the server decides whether it would accept
        the object, and stores nothing.
        """
        query = {"dry_run": "All"} if dry_run else {}
        created = self.requests.json(kind, "create", _name(body), body=body, **query)
        return _in_namespace(created, kind, self.namespace)

    def apply(self, kind: ResourceKind, body: Object, *, force: bool = False) -> Object:
        """Create an object, or change it to contain ``body`` (server-side apply).

        Fields that an earlier apply set and ``body`` leaves out are removed. If someone else set a
        field, raises `UserError` that names the field and its owner, unless ``force``.
        """
        name = _name(body)
        try:
            applied = self.requests.json(
                kind,
                "server_side_apply",
                name,
                body=body,
                field_manager=FIELD_MANAGER,
                force_conflicts=str(force).lower(),
            )
        except ResourceConflict as conflict:
            raise UserError(
                f"{kind.name} {name}: {conflict}; someone else manages this field: remove it "
                "there, or delete the object and run this again"
            ) from None
        return _in_namespace(applied, kind, self.namespace)

    def patch(
        self, kind: ResourceKind, name: str, change: Object, *, subresource: str = ""
    ) -> Object:
        """Merge ``change`` into an object (JSON merge patch: None removes a key, lists replace).

        Raises `ResourceConflict` if ``change`` names another resourceVersion than the current one.
        """
        changed: Object | None = self.requests.json(
            kind,
            "patch",
            name,
            subresource=subresource,
            body=change,
            field_manager=FIELD_MANAGER,
            content_type="application/merge-patch+json",
        )
        if changed is None:
            raise UserError(f"there is no {kind.name} {name} in namespace {self.namespace}")
        return changed

    def delete(self, kind: ResourceKind, name: str, uid: str = "") -> bool:
        """Delete an object and what it owns; False if it does not exist or has another ``uid``."""
        body: Object = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            deleted = self.requests.json(kind, "delete", name, body=body)
        except ResourceConflict:
            return False
        return deleted is not None

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
        """Get an object repeatedly until ``judge`` returns a value, and return that.

        ``judge`` gets None if the object does not exist, and may raise. Raises `NotInTime` after
        ``timeout_s``, with the cause that ``late`` returns.
        """
        waiting = tenacity.Retrying(
            stop=tenacity.stop_after_delay(timeout_s),
            wait=tenacity.wait_fixed(interval_s),
            retry=tenacity.retry_if_result(lambda judged: judged is None),
        )
        try:
            return waiting(lambda: judge(self.get(kind, name)))  # type: ignore[return-value]
        except tenacity.RetryError:
            why = late() or describe(self.get(kind, name))
            what = f"{kind.name} {name} in namespace {self.namespace}"
            raise NotInTime(f"{what} is not ready after {timeout_s:g} s", why) from None

    def log(self, pod: str, container: str = "", **query: str) -> str:
        """The log of a pod's container; ``query`` as in the API (tailLines, sinceTime, ...).

        Retries a failing server for `LOG_PATIENCE_S` only.
        """
        if container:
            query["container"] = container
        text = self.requests.text(
            POD,
            "get",
            pod,
            query_params=list(query.items()),
            subresource="log",
            patience_s=min(self.requests.patience_s, LOG_PATIENCE_S),
        )
        return text or ""

    def token(self) -> str:
        """The bearer token that requests carry; empty without one (client certificates)."""
        return self.requests.token()

    def user(self) -> str:
        """The name under which the API server knows the account of these requests."""
        body = {"apiVersion": REVIEW.api_version, "kind": REVIEW.name}
        found = self.requests.json(REVIEW, "create", body=body)
        return str(found["status"]["userInfo"]["username"])

    def may(self, verb: str, group: str, resource: str) -> bool:
        """Whether the account of these requests has a permission in this namespace."""
        asked = {"namespace": self.namespace, "group": group, "resource": resource, "verb": verb}
        body = {
            "apiVersion": ACCESS.api_version,
            "kind": ACCESS.name,
            "spec": {"resourceAttributes": asked},
        }
        found = self.requests.json(ACCESS, "create", body=body)
        return bool(found["status"]["allowed"])

    def preferred_version(self, group: str) -> str:
        """The version of an API group that this cluster prefers: ``kueue.x-k8s.io/v1beta2``. Empty
        if it does not serve the group."""
        found = self.requests.document(f"/apis/{group}")
        return "" if found is None else str(found["preferredVersion"]["groupVersion"])

    def schema(self, kind: ResourceKind) -> Object | None:
        """This cluster's JSON schema of a kind, or None if the cluster does not know the kind.

        Every service account may read it, unlike the CustomResourceDefinition.
        """
        path = f"/openapi/v3/apis/{kind.api_version}" if kind.group else "/openapi/v3/api/v1"
        found = self.requests.document(path)
        if found is None:
            return None
        group, _, version = kind.api_version.rpartition("/")
        wanted = {"group": group, "version": version, "kind": kind.name}
        for schema in found["components"]["schemas"].values():
            if wanted in schema.get("x-kubernetes-group-version-kind", []):
                return dict(schema)
        return None


def connect(namespace: str = "", patience_s: float = PATIENCE_S) -> Cluster:
    """The cluster in KUBECONFIG, else that of this pod's service account, else in ~/.kube/config.

    ``namespace`` defaults to that of the pod or of the kubeconfig's context. Raises `UserError` if
    there is no cluster or no namespace.
    """
    import kubernetes.client
    import kubernetes.config

    configuration = kubernetes.client.Configuration()
    configuration.retries = False  # `Requests` retries
    # Pass it each time: the package reads the variable only once, when it is imported.
    file = os.environ.get("KUBECONFIG") or None
    of_this_pod = in_pod() and not file
    try:
        if of_this_pod:
            kubernetes.config.load_incluster_config(client_configuration=configuration)
            default = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.is_file() else ""
        else:
            kubernetes.config.load_kube_config(file, client_configuration=configuration)
            context = kubernetes.config.list_kube_config_contexts(file)[1]
            default = context["context"].get("namespace", "")
    except kubernetes.config.ConfigException as error:
        raise UserError(
            f"no cluster is known here: {error}; log in (`oc login`), or set KUBECONFIG"
        ) from None
    namespace = namespace or default
    if not namespace:
        raise UserError(
            "no namespace is known: name one, or set one with `oc project <name>` or "
            "`kubectl config set-context --current --namespace=<name>`"
        )
    api = kubernetes.client.ApiClient(configuration)
    return Cluster(Requests(api, namespace, patience_s), namespace)


def condition(object: Object, type: str) -> Object | None:
    """The condition of this type, or None if nothing has set it for the current generation."""
    status = object.get("status") or {}
    generation = object["metadata"].get("generation", 0)
    for each in status.get("conditions", []):
        seen = each.get("observedGeneration", status.get("observedGeneration", generation))
        if each["type"] == type and seen >= generation:
            return dict(each)
    return None


def describe(object: Object | None) -> str:
    """The conditions of an object, in one line."""
    if object is None:
        return "it does not exist"
    conditions = (object.get("status") or {}).get("conditions", [])
    parts = [
        f"{each['type']}={each['status']}"
        + "".join(f" {each[key]}" for key in ("reason", "message") if each.get(key))
        for each in conditions
    ]
    return "; ".join(parts) or "its controller has not reported a status yet"


def _name(body: Object) -> str:
    return str(body["metadata"]["name"])


def _in_namespace(created: Any, kind: ResourceKind, namespace: str) -> Object:
    if created is None:  # the API answers "not found" if the namespace does not exist
        raise UserError(f"{kind.name}: there is no namespace {namespace}")
    return dict(created)
