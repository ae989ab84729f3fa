"""The registry's HTTP API as the real server answers: v1alpha3, and the same under v1.

It has what nudge and the registry's unmodified client use. Every answer follows a recording of the
real server; filter queries are refused.
"""

import base64
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nudge.pipelines.local.registry import bodies
from nudge.pipelines.local.registry.bodies import (
    ARTIFACT_KINDS,
    KINDS,
    MODEL_VERSION,
    REGISTERED_MODEL,
    BadBody,
    EntityKind,
    decode,
    parse_id,
)
from nudge.pipelines.local.registry.store import Collation, EntityConflict, Store, TooLong

API = "/api/model_registry"
VERSIONS = ("v1alpha3", "v1")
DEFAULT_PAGE, LARGEST_PAGE = 100, 1000
MODEL_ARTIFACT = ("model-artifact",)
CODES = {
    400: "Bad Request",
    404: "Not Found",
    409: "Conflict",
    422: "Bad Request",
    500: "Internal Server Error",
}

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    database: Path,
    collation: Collation = "postgresql",
    versions: Iterable[str] = VERSIONS,
) -> Starlette:
    """The application over a database file, which is created if needed.

    ``collation`` names the database whose rules apply to names; ``versions`` are the API versions
    to serve.
    """
    api = Api(Store(database, collation))
    routes = [
        Route(f"{API}/{version}{path}", _Methods(handlers))
        for version in versions
        for path, handlers in api.routes().items()
    ]
    routes += [Route(f"/readyz/{name}", _Methods({"GET": _ok})) for name in ("health", "isDirty")]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _router_error,
            BadBody: _bad_body,
            TooLong: _too_long,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Methods:
    """The handlers of one path by method; other methods get the answer of the server's router."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        handler = self._handlers.get(request.method)
        if handler is None:
            allowed = list(self._handlers)[-1]
            answer = Response(status_code=405, headers={"Allow": allowed})
        else:
            answer = await handler(request)
        await answer(scope, receive, send)


class NotFound(BadBody):
    """There is no such entity."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}: not found", 404)


class Api:
    """The handlers over one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def routes(self) -> dict[str, dict[str, Handler]]:
        """Every path below a version's prefix, with its handlers by method."""
        routes: dict[str, dict[str, Handler]] = {}
        for kind in KINDS:
            routes |= self._of_kind(kind)
        routes["/registered_models/{id}/versions"] = self._versions_of()
        routes["/model_versions/{id}/artifacts"] = self._artifacts_of()
        routes |= self._of_artifacts("artifact", "artifacts", ARTIFACT_KINDS)
        routes |= self._of_artifacts("model_artifact", "model_artifacts", MODEL_ARTIFACT)
        return routes

    def _of_kind(self, kind: EntityKind) -> dict[str, dict[str, Handler]]:
        async def create(request: Request) -> Response:
            return self._create(kind, bodies.created(kind, decode(await request.body())))

        async def update(request: Request) -> Response:
            changes = bodies.updated(kind, decode(await request.body()))
            found = self._get((kind.plural,), kind.title, request)
            return self._change(kind.title, found, changes)

        async def every(request: Request) -> Response:
            return self._list((kind.plural,), request)

        async def find(request: Request) -> Response:
            return self._find((kind.plural,), kind.title, request, bool(kind.parent_field))

        async def one(request: Request) -> Response:
            return JSONResponse(self._get((kind.plural,), kind.title, request))

        return {
            f"/{kind.name}": {"GET": find},
            f"/{kind.plural}": {"GET": every, "POST": create},
            f"/{kind.plural}/{{id}}": {"GET": one, "PATCH": update},
        }

    def _versions_of(self) -> dict[str, Handler]:
        async def create(request: Request) -> Response:
            body = bodies.created(MODEL_VERSION, decode(await request.body()))
            parent = parse_id(request.path_params["id"], "invalid registered model ID")
            return self._create(MODEL_VERSION, {**body, "registeredModelId": str(parent)})

        async def every(request: Request) -> Response:
            parent = parse_id(request.path_params["id"], "invalid registered model ID")
            return self._list((MODEL_VERSION.plural,), request, parent)

        return {"GET": every, "POST": create}

    def _artifacts_of(self) -> dict[str, Handler]:
        async def upsert(request: Request) -> Response:
            data = decode(await request.body())
            body = bodies.artifact(data, ARTIFACT_KINDS)
            version = self._get((MODEL_VERSION.plural,), MODEL_VERSION.title, request)
            kind = body["artifactType"]
            if not (artifact_id := data.get("id")):
                return self._create_artifact(kind, int(version["id"]), body)
            found = self._store.get((kind,), parse_id(artifact_id, "invalid artifact ID"))
            if found is None:
                title = kind.replace("-", " ")
                what = f"artifact with id {artifact_id} is not a {title}"
                raise BadBody(f"mismatched types, {what}: bad request")
            return self._change(kind, found, {**body, "name": found["name"]})

        async def every(request: Request) -> Response:
            parent = parse_id(request.path_params["id"], "invalid model version ID")
            return self._list(_asked_types(request), request, parent)

        return {"GET": every, "POST": upsert}

    def _of_artifacts(
        self, single: str, plural: str, types: tuple[str, ...]
    ) -> dict[str, dict[str, Handler]]:
        async def create(request: Request) -> Response:
            body = bodies.artifact(decode(await request.body()), types)
            return self._create_artifact(body["artifactType"], 0, body)

        async def update(request: Request) -> Response:
            data = decode(await request.body())
            found = self._get(types, single.replace("_", " "), request)
            kind = found["artifactType"]
            wanted = data.get("artifactType") if isinstance(data, dict) else None
            if wanted != kind and not (wanted is None and len(types) == 1):
                raise BadBody(
                    f"cannot change artifact type from '{kind}' to '{wanted or 'unknown'}': "
                    "artifact type is immutable"
                )
            return self._change(kind, found, bodies.artifact(data, (kind,), update=True))

        async def every(request: Request) -> Response:
            return self._list(_asked_types(request, types), request)

        async def find(request: Request) -> Response:
            return self._find(types, single.replace("_", " "), request, True)

        async def one(request: Request) -> Response:
            return JSONResponse(self._get(types, single.replace("_", " "), request))

        return {
            f"/{single}": {"GET": find},
            f"/{plural}": {"GET": every, "POST": create},
            f"/{plural}/{{id}}": {"GET": one, "PATCH": update},
        }

    def _create(self, kind: EntityKind, body: dict[str, Any]) -> Response:
        parent = int(body[kind.parent_field]) if kind.parent_field else 0
        # The server checks only this parent.
        is_service = kind.plural == "inference_services"
        if is_service and self._store.get(("serving_environments",), parent) is None:
            raise NotFound(f"no serving environment found for id {parent}")
        body = {**body, "name": body.get("name") or str(uuid.uuid4())}
        return self._made(kind.title, kind.plural, parent, body)

    def _create_artifact(self, kind: str, parent: int, body: dict[str, Any]) -> Response:
        body = {**body, "name": body.get("name") or str(uuid.uuid4())}
        return self._made(kind.replace("-", " "), kind, parent, body)

    def _made(self, title: str, kind: str, parent: int, body: dict[str, Any]) -> Response:
        try:
            return JSONResponse(self._store.create(kind, parent, body), 201)
        except EntityConflict as conflict:
            return _exists(title, conflict)

    def _change(self, title: str, found: dict[str, Any], changes: dict[str, Any]) -> Response:
        try:
            return JSONResponse(self._store.update(int(found["id"]), changes))
        except EntityConflict as conflict:
            return _exists(title, conflict)

    def _get(self, types: tuple[str, ...], title: str, request: Request) -> dict[str, Any]:
        entity_id = request.path_params["id"]
        found = self._store.get(types, parse_id(entity_id, f"invalid {title} ID"))
        if found is None:
            raise NotFound(f"no {title} found for id {entity_id}")
        return found

    def _find(
        self, types: tuple[str, ...], title: str, request: Request, needs_parent: bool
    ) -> Response:
        asked = request.query_params
        name, external_id = asked.get("name", ""), asked.get("externalId", "")
        parent = asked.get("parentResourceId", "")
        for field, value in (("name", name), ("externalId", external_id)):
            if "\0" in value:
                raise BadBody(
                    f"Invalid {field} query parameter: contains null bytes which are not allowed"
                )
        parent_id = parse_id(parent, f"invalid {REGISTERED_MODEL.title} ID") if parent else 0
        if not external_id and not (name and (parent or not needs_parent)):
            named = "(name and parentResourceId)," if needs_parent else "name"
            raise BadBody(
                f"invalid parameters call, supply either {named} or externalId: bad request"
            )
        found = self._store.find(types, name=name, external_id=external_id, parent=parent_id)
        if len(found) != 1:
            how_many = "multiple" if found else "no"
            raise NotFound(f"{how_many} {title}s found for name={name}, externalId={external_id}")
        return JSONResponse(found[0])

    def _list(
        self, types: tuple[str, ...], request: Request, parent: int | None = None
    ) -> Response:
        rows: Iterable[dict[str, Any]] = self._store.children(types, parent)
        if parent is not None and (name := request.query_params.get("name")):
            rows = [row for row in rows if self._store.matches(name, row["name"])]
        return _page(rows, request)


def _page(rows: Iterable[dict[str, Any]], request: Request) -> Response:
    """One page of rows, ordered as the request asks."""
    asked = request.query_params
    if asked.get("filterQuery", "").strip():
        raise BadBody("filterQuery is not supported by the embedded registry")
    page_size = parse_id(asked.get("pageSize") or "0", "invalid numeric string")
    size = min(page_size, LARGEST_PAGE) if page_size > 0 else DEFAULT_PAGE
    field = {
        "CREATE_TIME": "createTimeSinceEpoch",
        "LAST_UPDATE_TIME": "lastUpdateTimeSinceEpoch",
    }.get(asked.get("orderBy", ""), "id")
    backwards = asked.get("sortOrder") == "DESC"

    def key(row: dict[str, Any]) -> tuple[int, int]:
        return int(row[field]), int(row["id"])

    ordered = sorted(rows, key=key, reverse=backwards)
    if token := asked.get("nextPageToken"):
        last = _from_token(token)
        ordered = [row for row in ordered if (key(row) < last if backwards else key(row) > last)]
    shown = ordered[:size]
    following = _to_token(key(shown[-1])) if len(ordered) > size else ""
    body = {"items": shown, "size": len(shown), "pageSize": page_size, "nextPageToken": following}
    return JSONResponse(body)


def _to_token(key: tuple[int, int]) -> str:
    return base64.b64encode("{1}:{0}".format(*key).encode()).decode()


def _from_token(token: str) -> tuple[int, int]:
    try:
        text = base64.b64decode(token, validate=True).decode()
    except ValueError:
        raise BadBody("invalid nextPageToken: illegal base64 data: bad request") from None
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    if match is None:
        raise BadBody("invalid nextPageToken: this server did not issue it: bad request")
    return int(match[2]), int(match[1])


def _asked_types(request: Request, types: tuple[str, ...] = ARTIFACT_KINDS) -> tuple[str, ...]:
    asked = request.query_params.get("artifactType")
    if not asked:
        return types
    if asked not in ARTIFACT_KINDS:
        raise BadBody(f"invalid artifact type {asked}: bad request")
    return (asked,) if asked in types else ()


def _error(status: int, message: str) -> Response:
    return JSONResponse({"code": CODES[status], "message": message}, status)


def _exists(title: str, conflict: EntityConflict) -> Response:
    return _error(409, f"{title} with name {conflict} already exists: conflict")


async def _ok(_: Request) -> Response:
    return PlainTextResponse("OK")


async def _router_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{error.status_code} page not found\n", error.status_code)


async def _bad_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadBody)
    return _error(error.status, str(error))


async def _too_long(_: Request, error: Exception) -> Response:
    return _error(
        500,
        f"error saving {error}: ERROR: value too long for type character varying(255) "
        "(SQLSTATE 22001)",
    )
