"""A stand-in for the Kubernetes API server, over real HTTP on 127.0.0.1, for tests.

    with KubernetesApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        api.on_change("TrainJob", lambda job: api.set_status(job, conditions=[...]))

It creates, gets, lists (label and field selectors, pages), merge-patches, applies (with conflicts
between field managers), deletes (with what the object owns), keeps uid, resourceVersion and
generation, serves pod logs and the OpenAPI schema of each kind, and refuses what
`tests.kubernetes_schemas` finds wrong: unknown fields too, as ``fieldValidation=Strict`` does.
Controllers are functions that a test gives; each runs in a thread of its own. What goes wrong is
said beforehand: `forbid`, `fail_next`, `lose_next`. It knows no watches, no CEL and no quota.
"""

import contextlib
import copy
import datetime
import json
import re
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable
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
from tests.kubernetes_apply import apply_fields, merge_patch, take_ownership

Object = dict[str, Any]
Key = tuple[str, str, str]
NAMESPACE = "project"
USER = f"system:serviceaccount:{NAMESPACE}:pipeline-runner-dspa"
PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>v[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<subresource>status|log))?"
)
CORE = {
    "v1": ("ConfigMap", "Event", "PersistentVolumeClaim", "Pod", "Secret", "Service"),
    "apps/v1": ("Deployment",),
    "batch/v1": ("Job",),
    "coordination.k8s.io/v1": ("Lease",),
}
REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


def rights(role: str) -> set[tuple[str, str, str]]:
    """What a Role of the manifests gives: (API group, resource, verb)."""
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


class Refused(Exception):
    """What the server answers instead of the object."""

    def __init__(self, status: int, message: str, reason: str = "", **details: Any) -> None:
        super().__init__(message)
        self.status, self.reason, self.details = status, reason or REASONS[status], details


@dataclass
class Fault:
    """The next ``times`` requests of this verb and resource ("" is any) fail."""

    verb: str
    plural: str
    times: int
    status: int = 0
    """0 loses the answer after the work was done."""
    headers: tuple[tuple[str, str], ...] = ()


class KubernetesApi:
    """The server; ``objects`` and ``requests`` (verb, resource, name) are there for assertions."""

    def __init__(self, namespace: str = NAMESPACE, role: str = "") -> None:
        """``role`` names one of manifests/base/access.yaml: whoever asks may do what it gives."""
        self.namespace = namespace
        self._given = rights(role) if role else None
        self.token = secrets.token_urlsafe(32)
        self.objects: dict[Key, Object] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.errors: list[BaseException] = []
        """What controllers raised; the server's end raises the first of them."""
        self._lock = threading.RLock()
        self._version = 0
        self._owners: dict[Key, dict[Any, set[str]]] = {}
        self._logs: dict[tuple[str, str], list[tuple[datetime.datetime, str]]] = {}
        self._forbidden: set[tuple[str, str]] = set()
        self._faults: list[Fault] = []
        self._controllers: dict[tuple[str, str], Callable[[Object], None]] = {}
        self._threads: list[threading.Thread] = []
        self._kinds = {
            (f"{kind.lower()}s", version): (version, kind)
            for version, kinds in CORE.items()
            for kind in kinds
        }
        for (version, kind), found in schemas.definitions().items():
            self._kinds[found["spec"]["names"]["plural"], version] = (version, kind)
        self.older: dict[str, Callable[[Object], Object]] = {}
        """By kind, what makes the schema of an older release of the newest one."""

    # The server itself.

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

    # What a test says and asks, as the cluster's other inhabitants would.

    def add(self, body: Object, **status: Any) -> Object:
        """Put an object there as a controller would; ``status`` are fields of its status."""
        with self._lock:
            made = self._create(copy.deepcopy(body), body["metadata"].get("namespace"), "test")
        return self.set_status(made, **status) if status else made

    def find(self, kind: str, name: str) -> Object | None:
        """A copy of an object, or None."""
        with self._lock:
            return copy.deepcopy(self.objects.get((kind, self.namespace, name)))

    def all(self, kind: str) -> list[Object]:
        """Copies of every object of a kind."""
        with self._lock:
            return [copy.deepcopy(body) for key, body in self.objects.items() if key[0] == kind]

    def set_status(self, body: Object, **status: Any) -> Object:
        """Merge ``status`` into an object's status; does nothing if it is gone."""
        with self._lock:
            current = self.objects.get(_key(body))
            if current is None or current["metadata"]["uid"] != body["metadata"]["uid"]:
                return body
            changed = merge_patch(current, {"status": status})
            _refuse_wrong(changed)
            return self._store(changed, bump=False)

    def remove(self, kind: str, name: str) -> None:
        """Delete an object by hand."""
        with self._lock:
            self._delete((kind, self.namespace, name))

    def write_log(self, pod: str, container: str, *lines: str) -> None:
        """Append lines to a container's log."""
        with self._lock:
            log = self._logs.setdefault((pod, container), [])
            log.extend((datetime.datetime.now(datetime.UTC), line) for line in lines)

    def warn(self, body: Object, reason: str, message: str) -> None:
        """Record an event of type Warning about an object."""
        meta, now = body["metadata"], _now()
        involved = {"kind": body["kind"], "name": meta["name"], "uid": meta["uid"]}
        named = {"name": f"{meta['name']}.{secrets.token_hex(4)}"}
        self.add(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": named,
                "type": "Warning",
                "reason": reason,
                "message": message,
                "involvedObject": involved,
                "lastTimestamp": now,
            }
        )

    def on_change(self, kind: str, controller: Callable[[Object], None]) -> None:
        """Call ``controller`` with each new object of a kind, and each new generation of one."""
        self._controllers["change", kind] = controller

    def on_delete(self, kind: str, controller: Callable[[Object], None]) -> None:
        """Call ``controller`` with each deleted object of a kind."""
        self._controllers["delete", kind] = controller

    def forbid(self, verb: str, resource: str) -> None:
        """Answer 403 to this verb on this resource (``trainjobs``, ``pods/log``)."""
        self._forbidden.add((verb, resource))

    def forget_kind(self, kind: str) -> None:
        """Be a cluster on which this kind is not installed."""
        self._kinds = {key: found for key, found in self._kinds.items() if found[1] != kind}

    def fail_next(
        self, status: int, *, verb: str = "", resource: str = "", times: int = 1, **headers: str
    ) -> None:
        """Answer ``status`` to the next requests instead of doing them."""
        named = tuple((key.replace("_", "-"), value) for key, value in headers.items())
        self._faults.append(Fault(verb, resource, times, status, named))

    def lose_next(self, *, verb: str = "", resource: str = "", times: int = 1) -> None:
        """Do the next requests, and cut the connection before their answers are whole."""
        self._faults.append(Fault(verb, resource, times))

    # Answering.

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
        self._check_right(verb, part)
        with self._lock:
            response = self._do(request, verb, part, self._kinds[part["plural"], version], body)
        if fault:  # more is promised than comes: the client sees the connection end
            response.headers["content-length"] = str(len(response.body) + 1)
        return response

    def _fault(self, verb: str, plural: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.verb in ("", verb) and fault.plural in ("", plural):
                    fault.times -= 1
                    return fault
        return None

    def _check_right(self, verb: str, part: dict[str, Any]) -> None:
        resource = part["plural"] + (f"/{part['subresource']}" if part["subresource"] else "")
        group = part["group"] or ""
        lacking = self._given is not None and (group, resource, verb) not in self._given
        if lacking or (verb, resource) in self._forbidden:
            name = f' "{part["name"]}"' if part["name"] else ""
            raise Refused(
                403,
                f'{part["plural"]}{f".{group}" if group else ""}{name} is forbidden: User "{USER}" '
                f'cannot {verb} resource "{resource}" in API group "{group}" in the namespace '
                f'"{part["namespace"]}"',
            )

    def _do(
        self, request: Request, verb: str, part: dict[str, Any], kind: tuple[str, str], body: Any
    ) -> Response:
        query = request.query_params
        key = (kind[1], part["namespace"] or "", part["name"] or "")
        manager = query.get("fieldManager") or request.headers.get("user-agent", "unknown")
        if verb == "list":
            return JSONResponse(self._list(kind, part["namespace"], query))
        if part["subresource"] == "log":
            self._there(key, part)
            return PlainTextResponse(self._log(part["name"], query))
        if verb == "create":
            return JSONResponse(self._create(body, part["namespace"], manager, kind), 201)
        media = request.headers.get("content-type", "")
        if verb == "patch" and media == "application/apply-patch+yaml":
            if not query.get("fieldManager"):
                raise Refused(422, "PatchOptions.meta.k8s.io is invalid: fieldManager: Required")
            return JSONResponse(self._apply(key, body, kind, manager, query.get("force") == "true"))
        current = self._there(key, part)
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
        return JSONResponse(self._change(current, changed, part["subresource"] or "", manager))

    def _there(self, key: Key, part: dict[str, Any]) -> Object:
        if key not in self.objects:
            plural = part["plural"] + (f".{part['group']}" if part["group"] else "")
            raise Refused(404, f'{plural} "{key[2]}" not found', name=key[2], kind=part["plural"])
        return self.objects[key]

    def _list(self, kind: tuple[str, str], namespace: str | None, query: Any) -> Object:
        found = [
            body
            for (name, where, _), body in self.objects.items()
            if name == kind[1]
            and namespace in (None, where)
            and _selected(body, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        ]
        first, size = int(query.get("continue") or 0), int(query.get("limit") or 0)
        page = found[first : first + size] if size else found[first:]
        more = {"continue": str(first + size)} if size and first + size < len(found) else {}
        meta = {"resourceVersion": str(self._version), **more}
        return {
            "apiVersion": kind[0],
            "kind": f"{kind[1]}List",
            "metadata": meta,
            "items": page,
        }

    def _log(self, pod: str, query: Any) -> str:
        containers = [name for where, name in self._logs if where == pod]
        container = query.get("container") or (containers[0] if containers else "")
        if (pod, container) not in self._logs:
            raise Refused(
                400,
                f'container "{container}" in pod "{pod}" is waiting to start: ContainerCreating',
            )
        lines = list(self._logs[pod, container])
        if since := query.get("sinceTime"):
            moment = datetime.datetime.fromisoformat(since.replace("Z", "+00:00"))
            lines = [line for line in lines if line[0] >= moment.replace(microsecond=0)]
        if tail := query.get("tailLines"):
            lines = lines[-int(tail) :]
        stamped = query.get("timestamps") == "true"
        return "".join(
            (f"{at:%Y-%m-%dT%H:%M:%S.%f}000Z " if stamped else "") + f"{line}\n"
            for at, line in lines
        )

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

    # Changing objects; the lock is held.

    def _create(
        self,
        body: Object,
        namespace: str | None,
        manager: str,
        kind: tuple[str, str] | None = None,
    ) -> Object:
        if kind and (body.get("apiVersion"), body.get("kind")) != kind:
            raise Refused(400, f"the object is no {kind[1]} of {kind[0]}")
        meta = body.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + secrets.token_hex(3)[:5]
        given = meta.setdefault("namespace", namespace or self.namespace)
        if given != (namespace or self.namespace):
            raise Refused(400, "the namespace of the object does not match the path")
        _refuse_wrong(body)
        key = _key(body)
        if key in self.objects:
            message = f'{body["kind"].lower()}s "{key[2]}" already exists'
            raise Refused(409, message, "AlreadyExists", name=key[2])
        definition = schemas.definition(body)
        if definition:
            body = schemas.with_defaults(body, schemas.schema(definition))
            if "status" in definition["version"].get("subresources", {}):
                body.pop("status", None)
        body["metadata"] |= {
            "uid": str(uuid.uuid4()),
            "creationTimestamp": _now(),
            "generation": 1,
        }
        self._owners[key] = {}
        take_ownership(self._owners[key], {}, body, manager)
        return self._store(body, bump=False, tell=True)

    def _apply(
        self, key: Key, body: Object, kind: tuple[str, str], manager: str, force: bool
    ) -> Object:
        current = self.objects.get(key)
        if current is None:
            return self._create(body, key[1], manager, kind)
        owners = copy.deepcopy(self._owners[key])
        changed, conflicts = apply_fields(current, body, owners, manager, force)
        if conflicts:
            causes = [
                {"reason": "FieldManagerConflict", "message": f'conflict with "{who}"', "field": at}
                for at, who in conflicts
            ]
            told = ", ".join(f'conflict with "{who}": {at}' for at, who in conflicts)
            count = f"{len(conflicts)} conflict{'s' if len(conflicts) > 1 else ''}"
            raise Refused(409, f"Apply failed with {count}: {told}", causes=causes)
        made = self._change(current, changed, "", "")
        self._owners[key] = owners
        return made

    def _change(self, current: Object, changed: Object, subresource: str, manager: str) -> Object:
        for fixed in ("uid", "creationTimestamp", "generation", "name", "namespace"):
            changed["metadata"][fixed] = current["metadata"][fixed]
        version = changed["metadata"].get("resourceVersion")
        if version and version != current["metadata"]["resourceVersion"]:
            raise Refused(409, "the object has been modified; please apply your changes to it")
        if subresource == "status":
            changed = {**current, "status": changed.get("status", {})}
        else:
            definition = schemas.definition(changed)
            if definition and "status" in definition["version"].get("subresources", {}):
                changed.pop("status", None)
                changed |= {"status": current["status"]} if "status" in current else {}
        _refuse_wrong(changed)
        if manager and not subresource:
            take_ownership(self._owners[_key(current)], current, changed, manager)

        def wanted(body: Object) -> Object:
            return {name: part for name, part in body.items() if name not in ("metadata", "status")}

        return self._store(changed, bump=wanted(current) != wanted(changed))

    def _store(self, body: Object, *, bump: bool, tell: bool = False) -> Object:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        if bump:
            body["metadata"]["generation"] += 1
        self.objects[_key(body)] = body
        if bump or tell:
            self._call("change", body)
        return copy.deepcopy(body)

    def _delete(self, key: Key) -> Object:
        gone = self.objects.pop(key)
        self._owners.pop(key, None)
        uid = gone["metadata"]["uid"]
        for other, body in list(self.objects.items()):
            owners = body["metadata"].get("ownerReferences", [])
            left = [owner for owner in owners if owner["uid"] != uid]
            if owners and not left and other in self.objects:
                self._delete(other)
        self._call("delete", gone)
        return gone

    def _call(self, what: str, body: Object) -> None:
        controller = self._controllers.get((what, body["kind"]))
        if controller is None:
            return

        def work() -> None:
            try:
                controller(copy.deepcopy(body))
            except BaseException as error:  # noqa: BLE001 - told by __exit__
                self.errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()


def _key(body: Object) -> Key:
    return body["kind"], body["metadata"].get("namespace", ""), body["metadata"]["name"]


def _refuse_wrong(body: Object) -> None:
    if found := schemas.problems(body):
        name = body.get("metadata", {}).get("name", "")
        raise Refused(422, f'{body.get("kind")} "{name}" is invalid: {"; ".join(found)}')


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _selected(body: Object, labels: str, fields: str) -> bool:
    given = body["metadata"].get("labels", {})
    for term in filter(None, re.split(r",(?![^(]*\))", labels)):
        if match := re.fullmatch(r"\s*(\S+?)\s+(in|notin)\s+\(([^)]*)\)\s*", term):
            inside = given.get(match[1]) in [value.strip() for value in match[3].split(",")]
            if inside != (match[2] == "in"):
                return False
        elif match := re.fullmatch(r"([^!=]+)(==|=|!=)(.*)", term):
            if (given.get(match[1]) == match[3]) != (match[2] != "!="):
                return False
        elif (term.lstrip("!") in given) == term.startswith("!"):
            return False
    for term in filter(None, fields.split(",")):
        path, _, value = term.partition("=")
        found: Any = body
        for name in path.split("."):
            found = found.get(name, "") if isinstance(found, dict) else ""
        with contextlib.suppress(TypeError):
            if str(found) != value:
                return False
    return True
