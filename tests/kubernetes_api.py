"""A stand-in for the Kubernetes API server, over real HTTP on 127.0.0.1, for tests.

    with KubernetesApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        api.on_change("TrainJob", lambda job: api.set_status(job, conditions=[...]))

It creates, gets, lists (label and field selectors, pages), merge-patches, applies (with conflicts
between field managers), deletes (with what the object owns), keeps uid, resourceVersion and
generation, serves pod logs and the OpenAPI schema of each kind, and refuses objects that
`tests.kubernetes_schemas` finds invalid, including unknown fields, like ``fieldValidation=Strict``.
A test registers functions as controllers; each call runs in its own thread. A test plans faults
with `forbid`, `fail_next` and `lose_next`. Watches, CEL and quotas are not supported.

This module has HTTP, permissions and faults; the objects are in `tests.kubernetes_objects`.
"""

import copy
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests import kubernetes_schemas as schemas
from tests.kubernetes_apply import merge_patch
from tests.kubernetes_objects import REASONS, Key, Object, Objects, Refused

NAMESPACE = "project"
USER = f"system:serviceaccount:{NAMESPACE}:pipeline-runner-dspa"
PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>v[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<subresource>status|log|pendingworkloads))?"
)
CORE = {
    "v1": ("ConfigMap", "Event", "PersistentVolumeClaim", "Pod", "Secret", "Service"),
    "apps/v1": ("Deployment", "ReplicaSet"),
    "batch/v1": ("Job",),
    "coordination.k8s.io/v1": ("Lease",),
    "kueue.x-k8s.io/v1beta2": ("Workload",),
    "kueue.x-k8s.io/v1beta1": ("Workload",),
    "visibility.kueue.x-k8s.io/v1beta2": ("LocalQueue",),
    "visibility.kueue.x-k8s.io/v1beta1": ("LocalQueue",),
}


def rights(role: str) -> set[tuple[str, str, str]]:
    """The permissions of a Role in the manifests: (API group, resource, verb)."""
    path = Path(__file__).parents[1] / "manifests" / "base" / "access.yaml"
    (found,) = [
        each
        for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        if (each["kind"], each["metadata"]["name"]) == ("Role", role)
    ]
    return {
        (group, resource, verb)
        for rule in found["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@dataclass
class Fault:
    """The next ``times`` requests with this verb and resource ("" matches any) fail."""

    verb: str
    plural: str
    times: int
    status: int = 0
    """0 means: do the work, then lose the answer."""
    headers: tuple[tuple[str, str], ...] = ()


class KubernetesApi(Objects):
    """The server; ``objects`` and ``requests`` (verb, resource, name) are for assertions."""

    def __init__(self, namespace: str = NAMESPACE, role: str = "") -> None:
        """``role`` is one in manifests/base/access.yaml; clients have its permissions, or all."""
        super().__init__(namespace)
        self.user, self._allowed = USER, rights(role) if role else None
        self.admit: Callable[[str, Object], str] = lambda operation, body: ""
        """Called with CREATE or UPDATE and an object; returns why a policy refuses it."""
        self.token = secrets.token_urlsafe(32)
        self.requests: list[tuple[str, str, str]] = []
        self._forbidden: set[tuple[str, str]] = set()
        self._faults: list[Fault] = []
        self._kinds = {
            (f"{kind.lower()}s", version): (version, kind)
            for version, kinds in CORE.items()
            for kind in kinds
        }
        for (version, kind), found in schemas.definitions().items():
            self._kinds[found["spec"]["names"]["plural"], version] = (version, kind)
        self.pending: dict[str, list[str]] = {}
        """By LocalQueue, the names of the Workloads that wait in it, as Kueue orders them."""
        self.older: dict[str, Callable[[Object], Object]] = {}
        """By kind, a function that turns the newest schema into that of an older release."""

    def act_as(self, user: str, *roles: str) -> None:
        """From now on requests come from this account, which has these Roles of the manifests."""
        self.user, self._allowed = user, set().union(*map(rights, roles))

    def may(self, group: str, resource: str, verb: str) -> bool:
        """Whether the account of the requests has a permission."""
        return self._allowed is None or (group, resource, verb) in self._allowed

    # The server.

    def __enter__(self) -> "KubernetesApi":
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
        application = Starlette(routes=[Route("/{path:path}", self._serve, methods=methods)])
        self._server = uvicorn.Server(
            uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        for thread in self._threads:
            thread.join(timeout=20)
        self._socket.close()
        if self.errors:
            raise self.errors[0]

    def kubeconfig(self, folder: Path) -> Path:
        """Write a kubeconfig for this server; returns its path."""
        named = {"name": "here"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{**named, "cluster": {"server": self.url}}],
            "users": [{**named, "user": {"token": self.token}}],
            "contexts": [
                {
                    **named,
                    "context": {"cluster": "here", "user": "here", "namespace": self.namespace},
                }
            ],
        }
        path = folder / "kubeconfig.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    # Faults.

    def forbid(self, verb: str, resource: str) -> None:
        """Answer 403 to this verb on this resource (``trainjobs``, ``pods/log``)."""
        self._forbidden.add((verb, resource))

    def forget_kind(self, kind: str) -> None:
        """Become a cluster without this kind."""
        self._kinds = {key: found for key, found in self._kinds.items() if found[1] != kind}

    def forget_version(self, version: str) -> None:
        """Be a cluster that does not serve this version of an API group."""
        self._kinds = {key: found for key, found in self._kinds.items() if key[1] != version}

    def fail_next(
        self, status: int, *, verb: str = "", resource: str = "", times: int = 1, **headers: str
    ) -> None:
        """Answer the next requests with ``status`` instead of doing them."""
        named = tuple((key.replace("_", "-"), value) for key, value in headers.items())
        self._faults.append(Fault(verb, resource, times, status, named))

    def lose_next(self, *, verb: str = "", resource: str = "", times: int = 1) -> None:
        """Do the next requests, and cut the connection before their answers are complete."""
        self._faults.append(Fault(verb, resource, times))

    # Answers.

    async def _serve(self, request: Request) -> Response:
        text = (await request.body()).decode()
        body = json.loads(text) if text else None
        try:
            return self._answer(request, body)
        except Refused as refused:
            status = {
                "apiVersion": "v1",
                "kind": "Status",
                "status": "Failure",
                "reason": refused.reason,
                "message": str(refused),
                "code": refused.status,
                "details": refused.details,
            }
            return JSONResponse(status, refused.status)

    def _answer(self, request: Request, body: Any) -> Response:
        if request.headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(401, "Unauthorized")
        if request.url.path.startswith("/openapi/v3/"):
            return self._openapi(request.url.path)
        if request.url.path == "/apis/authentication.k8s.io/v1/selfsubjectreviews":
            return JSONResponse({**body, "status": {"userInfo": {"username": self.user}}}, 201)
        if request.url.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            asked = body["spec"]["resourceAttributes"]
            allowed = self.may(asked["group"], asked["resource"], asked["verb"])
            return JSONResponse({**body, "status": {"allowed": allowed}}, 201)
        if group := re.fullmatch(r"/apis/([^/]+)", request.url.path):
            return self._group(group[1])
        match = PATH.fullmatch(request.url.path)
        if match is None:
            return PlainTextResponse("404 page not found\n", 404)
        part = match.groupdict()
        version = f"{part['group']}/{part['version']}" if part["group"] else part["version"]
        verb = {"GET": "get" if part["name"] else "list", "POST": "create", "PUT": "update"}.get(
            request.method, request.method.lower()
        )
        self.requests.append((verb, part["plural"], part["name"] or ""))
        fault = self._fault(verb, part["plural"])
        if fault and fault.status:
            raised = JSONResponse(
                {
                    "kind": "Status",
                    "status": "Failure",
                    "reason": REASONS.get(fault.status, ""),
                    "message": f"the server is not well ({fault.status})",
                    "code": fault.status,
                },
                fault.status,
            )
            raised.headers.update(dict(fault.headers))
            return raised
        if (part["plural"], version) not in self._kinds:
            return PlainTextResponse("404 page not found\n", 404)
        self._check_permission(verb, part)
        with self._lock:
            response = self._do(request, verb, part, self._kinds[part["plural"], version], body)
        if fault:  # announce more than is sent: the client sees the connection end
            response.headers["content-length"] = str(len(response.body) + 1)
        return response

    def _fault(self, verb: str, plural: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.verb in ("", verb) and fault.plural in ("", plural):
                    fault.times -= 1
                    return fault
        return None

    def _check_permission(self, verb: str, part: dict[str, Any]) -> None:
        resource = part["plural"] + (f"/{part['subresource']}" if part["subresource"] else "")
        group = part["group"] or ""
        if not self.may(group, resource, verb) or (verb, resource) in self._forbidden:
            name = f' "{part["name"]}"' if part["name"] else ""
            what = f"{part['plural']}{f'.{group}' if group else ''}{name}"
            raise Refused(
                403,
                f'{what} is forbidden: User "{self.user}" cannot {verb} resource "{resource}" in '
                f'API group "{group}" in the namespace "{part["namespace"]}"',
            )

    def _do(
        self, request: Request, verb: str, part: dict[str, Any], kind: tuple[str, str], body: Any
    ) -> Response:
        query = request.query_params
        key = (kind[1], part["namespace"] or "", part["name"] or "")
        manager = query.get("fieldManager") or request.headers.get("user-agent", "unknown")
        if verb == "list":
            return JSONResponse(self._list(kind, part["namespace"], query))
        if part["subresource"] == "pendingworkloads":
            return JSONResponse(self._pending(part, query))
        if part["subresource"] == "log":
            self._existing(key, part)
            return PlainTextResponse(self._log(part["name"], query))
        if verb == "create":
            if why := self.admit("CREATE", body):
                raise Refused(422, why)
            if query.get("dryRun") == "All":
                # As in DryRunnableStorage.Create of apiserver/pkg/registry/generic/registry: after
                # admission, a name that is taken is refused, and nothing is stored.
                self._refuse_taken((kind[1], part["namespace"], body["metadata"]["name"]))
                return JSONResponse(body, 201)
            return JSONResponse(self._create(body, part["namespace"], manager, kind), 201)
        media = request.headers.get("content-type", "")
        if verb == "patch" and media == "application/apply-patch+yaml":
            if not query.get("fieldManager"):
                raise Refused(422, "PatchOptions.meta.k8s.io is invalid: fieldManager: Required")
            return JSONResponse(self._apply(key, body, kind, manager, query.get("force") == "true"))
        current = self._existing(key, part)
        if verb == "get":
            return JSONResponse(current)
        if verb == "delete":
            wanted = ((body or {}).get("preconditions") or {}).get("uid")
            if wanted and wanted != current["metadata"]["uid"]:
                raise Refused(409, "the UID in the precondition does not match")
            return JSONResponse(self._delete(key))
        if verb == "patch" and media != "application/merge-patch+json":
            raise Refused(400, f"this stand-in takes merge patches and applies, not {media}")
        changed = merge_patch(current, body) if verb == "patch" else copy.deepcopy(body)
        if why := self.admit("UPDATE", changed):
            raise Refused(422, why)
        return JSONResponse(self._change(current, changed, part["subresource"] or "", manager))

    def _existing(self, key: Key, part: dict[str, Any]) -> Object:
        if key not in self.objects:
            plural = part["plural"] + (f".{part['group']}" if part["group"] else "")
            raise Refused(404, f'{plural} "{key[2]}" not found', name=key[2], kind=part["plural"])
        return self.objects[key]

    def _pending(self, part: dict[str, Any], query: Mapping[str, str]) -> Object:
        """The pending Workloads of a LocalQueue.

        No recording has this. It follows Kueue's source (commit ff69552e, 2026-08): `Get` in
        pkg/visibility/storage/pending_workloads_lq.go, boundedLimitOffset and newPendingWorkload in
        utils.go there, and apis/visibility/v1beta2/types.go.
        """
        queue = part["name"]
        if queue not in self.pending:
            message = f'localqueue.visibility.kueue.x-k8s.io "{queue}" not found'
            raise Refused(404, message, name=queue, kind="localqueue")
        limit = min(max(int(query.get("limit") or 0) or 1000, 0), 100_000)
        offset = max(int(query.get("offset") or 0), 0)
        items = []
        for position, name in enumerate(self.pending[queue][offset : offset + limit], offset):
            meta: Object = {"name": name, "namespace": part["namespace"]}
            if workload := self.find("Workload", name):
                kept = ("apiVersion", "kind", "name", "uid")
                owners = workload["metadata"].get("ownerReferences", [])
                meta["ownerReferences"] = [{key: each[key] for key in kept} for each in owners]
                meta["creationTimestamp"] = workload["metadata"]["creationTimestamp"]
            items.append(
                {
                    "metadata": meta,
                    "priority": 0,
                    "localQueueName": queue,
                    "positionInClusterQueue": position,
                    "positionInLocalQueue": position,
                }
            )
        version = f"{part['group']}/{part['version']}"
        summary = {"kind": "PendingWorkloadsSummary", "apiVersion": version}
        return {**summary, "metadata": {}, "items": items}

    def _group(self, name: str) -> Response:
        """What the server says of an API group; it prefers the newest version."""
        versions = sorted({key[1] for key in self._kinds if key[1].startswith(f"{name}/")})
        if not versions:
            return PlainTextResponse("404 page not found\n", 404)
        found = [{"groupVersion": each, "version": each.rpartition("/")[2]} for each in versions]
        body = {"kind": "APIGroup", "apiVersion": "v1", "name": name, "versions": found}
        return JSONResponse({**body, "preferredVersion": found[-1]})

    def _openapi(self, path: str) -> Response:
        version = path.removeprefix("/openapi/v3/").removeprefix("apis/").removeprefix("api/")
        found = {}
        for where, kind in self._kinds.values():
            if where == version and (definition := schemas.definitions().get((where, kind))):
                group, _, short = where.rpartition("/")
                schema = self.older.get(kind, lambda same: same)(schemas.schema(definition))
                named = {"group": group, "version": short, "kind": kind}
                found[kind] = {**schema, "x-kubernetes-group-version-kind": [named]}
        if not found:
            return PlainTextResponse("404 page not found\n", 404)
        return JSONResponse({"openapi": "3.0.0", "components": {"schemas": found}})
