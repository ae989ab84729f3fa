"""The objects of the stand-in for a cluster, and an API server's rules for them.

`tests.kubernetes_api` serves `Objects`: uid, resourceVersion and generation, field managers and
their conflicts, ownership, pod logs, and controllers that a test registers; each call of one runs
in its own thread. It refuses objects that `tests.kubernetes_schemas` finds invalid.
"""

import contextlib
import copy
import datetime
import re
import secrets
import threading
import uuid
from collections.abc import Callable
from typing import Any

from tests import kubernetes_schemas as schemas
from tests.kubernetes_apply import apply_fields, merge_patch, take_ownership

Object = dict[str, Any]
Key = tuple[str, str, str]
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


class Refused(Exception):
    """The server's error answer."""

    def __init__(self, status: int, message: str, reason: str = "", **details: Any) -> None:
        super().__init__(message)
        self.status, self.reason, self.details = status, reason or REASONS[status], details


class Objects:
    """The objects of one namespace; ``objects`` is for assertions."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.objects: dict[Key, Object] = {}
        self.errors: list[BaseException] = []
        """The exceptions that controllers raised."""
        self._lock = threading.RLock()
        self._version = 0
        self._owners: dict[Key, dict[Any, set[str]]] = {}
        self._logs: dict[tuple[str, str], list[tuple[datetime.datetime, str]]] = {}
        self._controllers: dict[tuple[str, str], Callable[[Object], None]] = {}
        self._threads: list[threading.Thread] = []

    # Methods for tests, acting as other clients of the cluster.

    def add(self, body: Object, **status: Any) -> Object:
        """Create an object as a controller would; ``status`` has the fields of its status."""
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
        """Merge ``status`` into an object's status; does nothing if the object is gone."""
        with self._lock:
            current = self.objects.get(_key(body))
            if current is None or current["metadata"]["uid"] != body["metadata"]["uid"]:
                return body
            changed = merge_patch(current, {"status": status})
            _refuse_invalid(changed)
            return self._store(changed, bump=False)

    def remove(self, kind: str, name: str) -> None:
        """Delete an object."""
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
        """Call ``controller`` with each new object of a kind, and each whose spec, labels or
        annotations changed."""
        self._controllers["change", kind] = controller

    def on_delete(self, kind: str, controller: Callable[[Object], None]) -> None:
        """Call ``controller`` with each deleted object of a kind."""
        self._controllers["delete", kind] = controller

    # Reading and changing objects; callers hold the lock.

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

    def _create(
        self,
        body: Object,
        namespace: str | None,
        manager: str,
        kind: tuple[str, str] | None = None,
    ) -> Object:
        if kind and (body.get("apiVersion"), body.get("kind")) != kind:
            raise Refused(400, f"the object is not a {kind[1]} of {kind[0]}")
        meta = body.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + secrets.token_hex(3)[:5]
        chosen = meta.setdefault("namespace", namespace or self.namespace)
        if chosen != (namespace or self.namespace):
            raise Refused(400, "the namespace of the object does not match the path")
        _refuse_invalid(body)
        key = _key(body)
        self._refuse_taken(key)
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
        return self._store(body, bump=False, notify=True)

    def _refuse_taken(self, key: Key) -> None:
        if key in self.objects:
            message = f'{key[0].lower()}s "{key[2]}" already exists'
            raise Refused(409, message, "AlreadyExists", name=key[2])

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
            listed = ", ".join(f'conflict with "{who}": {at}' for at, who in conflicts)
            count = f"{len(conflicts)} conflict{'s' if len(conflicts) > 1 else ''}"
            raise Refused(409, f"Apply failed with {count}: {listed}", causes=causes)
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
        _refuse_invalid(changed)
        if manager and not subresource:
            take_ownership(self._owners[_key(current)], current, changed, manager)

        def wanted(body: Object) -> Object:
            return {name: part for name, part in body.items() if name not in ("metadata", "status")}

        def marks(body: Object) -> list[Any]:
            return [body["metadata"].get(name) or {} for name in ("labels", "annotations")]

        marked = marks(current) != marks(changed)
        return self._store(changed, bump=wanted(current) != wanted(changed), notify=marked)

    def _store(self, body: Object, *, bump: bool, notify: bool = False) -> Object:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        if bump:
            body["metadata"]["generation"] += 1
        self.objects[_key(body)] = body
        if bump or notify:
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
            except BaseException as error:  # noqa: BLE001 - raised by __exit__
                self.errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()


def _key(body: Object) -> Key:
    return body["kind"], body["metadata"].get("namespace", ""), body["metadata"]["name"]


def _refuse_invalid(body: Object) -> None:
    if found := schemas.problems(body):
        name = body.get("metadata", {}).get("name", "")
        raise Refused(422, f'{body.get("kind")} "{name}" is invalid: {"; ".join(found)}')


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _selected(body: Object, labels: str, fields: str) -> bool:
    present = body["metadata"].get("labels", {})
    for term in filter(None, re.split(r",(?![^(]*\))", labels)):
        if match := re.fullmatch(r"\s*(\S+?)\s+(in|notin)\s+\(([^)]*)\)\s*", term):
            inside = present.get(match[1]) in [value.strip() for value in match[3].split(",")]
            if inside != (match[2] == "in"):
                return False
        elif match := re.fullmatch(r"([^!=]+)(==|=|!=)(.*)", term):
            if (present.get(match[1]) == match[3]) != (match[2] != "!="):
                return False
        elif (term.lstrip("!") in present) == term.startswith("!"):
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
