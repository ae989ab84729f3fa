"""The registry's HTTP API: v1alpha3, and the same under v1."""

import base64
import json
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from nudge.pipelines.local.registry import filters, kinds
from nudge.pipelines.local.registry.kinds import ARTIFACT_KINDS, KINDS, BadBody, Kind, checked
from nudge.pipelines.local.registry.store import ORDERS, Conflict, Store
from starlette.exceptions import HTTPException

PREFIXES = ("/api/model_registry/v1alpha3", "/api/model_registry/v1")
DEFAULT_PAGE, LARGEST_PAGE = 100, 1000
ID = re.compile(r"^[1-9][0-9]{0,8}$")
HISTORY = "metric-history"
SERVE = "serve_model"


def create_app(database: Path) -> FastAPI:
    """The application over a database file, which is made if it is not there."""
    app = FastAPI(title="Model Registry", openapi_url=None)
    api = Api(Store(database))
    for prefix in PREFIXES:
        app.include_router(api.router(), prefix=prefix)
    app.add_api_route("/health", lambda: {"status": "ok"})
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(BadBody, _bad_body)
    app.add_exception_handler(Conflict, _conflict)
    app.add_exception_handler(filters.BadFilter, lambda _, error: _error(400, str(error)))
    return app


class Api:
    """The handlers over one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def router(self) -> APIRouter:
        """Every route, without a prefix."""
        router = APIRouter()

        def add(method: str, path: str, handler: Callable[..., Any]) -> None:
            router.add_api_route(path, handler, methods=[method], response_model=None)

        add("GET", "/experiment_runs/metric_history", self.all_history)
        for kind in KINDS.values():
            self._add_kind(add, kind)
        for parent, children in (
            ("registered_models", "model_versions"),
            ("serving_environments", "inference_services"),
            ("experiments", "experiment_runs"),
        ):
            self._add_nested(add, KINDS[parent], KINDS[children])
        for parent in ("model_versions", "experiment_runs"):
            self._add_artifacts_of(add, KINDS[parent])
        self._add_artifacts(add, "artifact", "artifacts", ARTIFACT_KINDS)
        self._add_artifacts(add, "model_artifact", "model_artifacts", ("model-artifact",))
        add("GET", "/experiment_runs/{id}/metric_history", self.history)
        add("GET", "/inference_services/{id}/model", self.served_model)
        add("GET", "/inference_services/{id}/version", self.served_version)
        add("GET", "/inference_services/{id}/serves", self.serves)
        add("POST", "/inference_services/{id}/serves", self.serve)
        return router

    def _add_kind(self, add: Callable[..., None], kind: Kind) -> None:
        status = 200 if kind.plural == "inference_services" else 201

        async def create(request: Request) -> JSONResponse:
            body = checked(kind.create, await _json(request))
            return JSONResponse(self._create(kind, body), status)

        async def update(id: str, request: Request) -> JSONResponse:
            entity = self._get((kind.plural,), id)
            changes = checked(kind.update, await _json(request), partial=True)
            return JSONResponse(self._store.update(int(entity["id"]), changes))

        async def every(request: Request) -> JSONResponse:
            return self._list((kind.plural,), request)

        async def find(request: Request) -> JSONResponse:
            return JSONResponse(self._find((kind.plural,), request, bool(kind.parent)))

        async def one(id: str) -> JSONResponse:
            return JSONResponse(self._get((kind.plural,), id))

        add("POST", f"/{kind.plural}", create)
        add("GET", f"/{kind.plural}", every)
        add("GET", f"/{kind.name}", find)
        add("GET", f"/{kind.plural}/{{id}}", one)
        add("PATCH", f"/{kind.plural}/{{id}}", update)

    def _add_nested(self, add: Callable[..., None], parent: Kind, child: Kind) -> None:
        path = "versions" if child.plural == "model_versions" else child.plural

        async def create(id: str, request: Request) -> JSONResponse:
            self._get((parent.plural,), id)
            data = await _json(request)
            if isinstance(data, dict):
                data = {**data, child.parent_field: id}
            return JSONResponse(self._create(child, checked(child.create, data)), 201)

        async def every(id: str, request: Request) -> JSONResponse:
            self._get((parent.plural,), id)
            return self._list((child.plural,), request, int(id))

        add("POST", f"/{parent.plural}/{{id}}/{path}", create)
        add("GET", f"/{parent.plural}/{{id}}/{path}", every)

    def _add_artifacts_of(self, add: Callable[..., None], parent: Kind) -> None:
        async def upsert(id: str, request: Request) -> JSONResponse:
            self._get((parent.plural,), id)
            data = await _json(request)
            artifact, model, _ = kinds.artifact_models(data)
            body = checked(model, data)
            found = None
            if given := data.get("id"):
                found = self._get(ARTIFACT_KINDS, str(given))
            elif parent.plural == "experiment_runs" and body.get("name"):
                # A run's metrics and parameters are written again under the same name.
                name = body["name"]
                found = self._store.find((artifact,), name=name, external_id=None, parent=int(id))
            if found is None:
                made, status = self._create_artifact(artifact, int(id), body), 201
            else:
                _same_type(found, artifact)
                made, status = self._store.update(int(found["id"]), {**body, **_named(found)}), 200
            if artifact == "metric" and parent.plural == "experiment_runs":
                self._store.create(HISTORY, int(id), {**body, "name": None, "metric": made["name"]})
            return JSONResponse(made, status)

        async def every(id: str, request: Request) -> JSONResponse:
            self._get((parent.plural,), id)
            return self._list(_asked_types(request, ARTIFACT_KINDS), request, int(id))

        add("POST", f"/{parent.plural}/{{id}}/artifacts", upsert)
        add("GET", f"/{parent.plural}/{{id}}/artifacts", every)

    def _add_artifacts(
        self, add: Callable[..., None], single: str, plural: str, types: tuple[str, ...]
    ) -> None:
        async def create(request: Request) -> JSONResponse:
            data = await _json(request)
            if isinstance(data, dict) and len(types) == 1:
                data = {"artifactType": types[0], **data}
            artifact, model, _ = kinds.artifact_models(data)
            if artifact not in types:
                raise BadBody(f"artifactType {artifact!r}: expected {types[0]}")
            return JSONResponse(self._create_artifact(artifact, 0, checked(model, data)), 201)

        async def update(id: str, request: Request) -> JSONResponse:
            found = self._get(types, id)
            data = await _json(request)
            if isinstance(data, dict):
                data = {"artifactType": found["artifactType"], **data}
            artifact, _, model = kinds.artifact_models(data)
            _same_type(found, artifact)
            changes = checked(model, data, partial=True)
            return JSONResponse(self._store.update(int(id), changes))

        async def every(request: Request) -> JSONResponse:
            return self._list(_asked_types(request, types), request)

        async def find(request: Request) -> JSONResponse:
            return JSONResponse(self._find(types, request, True))

        async def one(id: str) -> JSONResponse:
            return JSONResponse(self._get(types, id))

        add("POST", f"/{plural}", create)
        add("GET", f"/{plural}", every)
        add("GET", f"/{single}", find)
        add("GET", f"/{plural}/{{id}}", one)
        add("PATCH", f"/{plural}/{{id}}", update)

    async def all_history(self, request: Request) -> JSONResponse:
        """The metric history of every run."""
        return self._history(request, None)

    async def history(self, id: str, request: Request) -> JSONResponse:
        """Every value that a metric of a run had."""
        self._get(("experiment_runs",), id)
        return self._history(request, int(id))

    async def served_model(self, id: str) -> JSONResponse:
        """The registered model of an inference service."""
        service = self._get(("inference_services",), id)
        return JSONResponse(self._get(("registered_models",), service["registeredModelId"]))

    async def served_version(self, id: str) -> JSONResponse:
        """The version that an inference service names, or the model's latest."""
        service = self._get(("inference_services",), id)
        if given := service.get("modelVersionId"):
            return JSONResponse(self._get(("model_versions",), given))
        parent = int(service["registeredModelId"])
        versions = list(self._store.children(("model_versions",), parent))
        if not versions:
            raise HTTPException(404, f"registered model {parent} has no version")
        return JSONResponse(versions[-1])

    async def serves(self, id: str, request: Request) -> JSONResponse:
        """What an inference service has served."""
        self._get(("inference_services",), id)
        return self._list((SERVE,), request, int(id))

    async def serve(self, id: str, request: Request) -> JSONResponse:
        """Note that an inference service serves a version."""
        import mr_openapi

        self._get(("inference_services",), id)
        body = checked(mr_openapi.ServeModelCreate, await _json(request))
        self._must_exist(("model_versions",), body["modelVersionId"], "modelVersionId")
        body.setdefault("name", str(uuid.uuid4()))
        return JSONResponse(self._store.create(SERVE, int(id), body), 201)

    def _create(self, kind: Kind, body: dict[str, Any]) -> dict[str, Any]:
        parent = 0
        if kind.parent:
            self._must_exist((kind.parent,), body[kind.parent_field], kind.parent_field)
            parent = int(body[kind.parent_field])
        if kind.plural == "inference_services":
            self._must_exist(("registered_models",), body["registeredModelId"], "registeredModelId")
            if given := body.get("modelVersionId"):
                self._must_exist(("model_versions",), given, "modelVersionId")
        if not body.get("name"):
            body["name"] = str(uuid.uuid4())
        return self._store.create(kind.plural, parent, body)

    def _create_artifact(self, kind: str, parent: int, body: dict[str, Any]) -> dict[str, Any]:
        if not body.get("name"):
            body["name"] = str(uuid.uuid4())
        return self._store.create(kind, parent, body)

    def _must_exist(self, types: tuple[str, ...], given: str, field: str) -> None:
        if not ID.match(given) or self._store.get(types, int(given)) is None:
            raise BadBody(f"{field} {given!r}: there is no such entity")

    def _get(self, types: tuple[str, ...], given: str) -> dict[str, Any]:
        found = self._store.get(types, int(given)) if ID.match(given) else None
        if found is None:
            raise HTTPException(404, f"no {types[0]} with id {given!r}")
        return found

    def _find(self, types: tuple[str, ...], request: Request, needs_parent: bool) -> dict[str, Any]:
        asked = request.query_params
        name, external_id = asked.get("name"), asked.get("externalId")
        parent = asked.get("parentResourceId") or "0"
        complete = external_id or (name and (parent != "0" or not needs_parent))
        if parent != "0" and not ID.match(parent):
            raise HTTPException(400, f"parentResourceId {parent!r} is not an id")
        if not complete:
            if needs_parent:
                raise HTTPException(400, "give externalId, or name and parentResourceId")
            raise HTTPException(404, "give name or externalId")
        found = self._store.find(types, name=name, external_id=external_id, parent=int(parent))
        if found is None:
            raise HTTPException(404, f"no {types[0]} {name or external_id!r}")
        return found

    def _history(self, request: Request, run: int | None) -> JSONResponse:
        items: Iterable[dict[str, Any]] = self._store.children((HISTORY,), run)
        wanted, steps = request.query_params.get("name"), request.query_params.get("stepIds")
        chosen = set(steps.split(",")) if steps else None
        rows = [
            {**{k: v for k, v in item.items() if k != "metric"}, "name": item["metric"]}
            for item in items
            if (not wanted or item["metric"] == wanted)
            and (chosen is None or str(item.get("step")) in chosen)
        ]
        return _page(rows, request)

    def _list(
        self, types: tuple[str, ...], request: Request, parent: int | None = None
    ) -> JSONResponse:
        asked = request.query_params
        rows: Iterable[dict[str, Any]] = self._store.children(types, parent)
        for field in ("name", "externalId"):
            if parent is not None and (wanted := asked.get(field)):
                rows = [row for row in rows if row.get(field) == wanted]
        return _page(rows, request)


def _page(rows: Iterable[dict[str, Any]], request: Request) -> JSONResponse:
    """One page of rows, filtered and ordered as the request asks."""
    asked = request.query_params
    if query := asked.get("filterQuery", "").strip():
        test = filters.parse(query)
        rows = [row for row in rows if test(row)]
    order, direction = asked.get("orderBy") or "ID", asked.get("sortOrder") or "ASC"
    if order not in ORDERS or direction not in ("ASC", "DESC"):
        raise HTTPException(400, f"orderBy {order!r} {direction!r}: expected {', '.join(ORDERS)}")
    field = {"created": "createTimeSinceEpoch", "updated": "lastUpdateTimeSinceEpoch"}
    size_text = asked.get("pageSize") or str(DEFAULT_PAGE)
    if not ID.match(size_text):
        raise HTTPException(400, f"pageSize {size_text!r}: expected a whole number from 1 on")
    size = min(int(size_text), LARGEST_PAGE)

    def key(row: dict[str, Any]) -> tuple[int, int]:
        return int(row[field.get(ORDERS[order], "id")]), int(row["id"])

    ordered = sorted(rows, key=key, reverse=direction == "DESC")
    if token := asked.get("nextPageToken"):
        last = _from_token(token)
        ordered = [r for r in ordered if (key(r) < last if direction == "DESC" else key(r) > last)]
    shown = ordered[:size]
    following = _to_token(key(shown[-1])) if len(ordered) > size else ""
    body = {"items": shown, "size": len(shown), "pageSize": size, "nextPageToken": following}
    return JSONResponse(body)


def _to_token(key: tuple[int, int]) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode()


def _from_token(token: str) -> tuple[int, int]:
    try:
        first, second = json.loads(base64.urlsafe_b64decode(token.encode()))
        return int(first), int(second)
    except (ValueError, TypeError):
        raise HTTPException(400, "nextPageToken is none that this server gave") from None


def _asked_types(request: Request, types: tuple[str, ...]) -> tuple[str, ...]:
    asked = request.query_params.get("artifactType")
    if not asked:
        return types
    if asked not in ARTIFACT_KINDS:
        raise HTTPException(400, f"artifactType {asked!r}: expected {', '.join(ARTIFACT_KINDS)}")
    return (asked,) if asked in types else ()


def _same_type(found: dict[str, Any], artifact: str) -> None:
    if found["artifactType"] != artifact:
        raise BadBody(f"artifactType is {found['artifactType']} and cannot be {artifact}")


def _named(found: dict[str, Any]) -> dict[str, Any]:
    return {"name": found["name"]}


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise BadBody("the body is not valid JSON") from None


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"code": str(status), "message": message}, status)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))


async def _conflict(request: Request, error: Exception) -> JSONResponse:
    # The API's description has no 409 for a change, only for what is made.
    return _error(400 if request.method == "PATCH" else 409, str(error))


async def _bad_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BadBody)
    # Only these two say in the API's description that what is missing is "unprocessable".
    unprocessable = request.url.path.endswith(("/model_versions", "/experiment_runs"))
    nested = re.search(r"/experiments/\d+/", request.url.path)
    return _error(422 if error.missing and unprocessable and not nested else 400, str(error))
