"""A pipelines server for tests, over real HTTP: what the API's own description allows, and no more.

Every request's body, query and path, and every answer, is held against the Swagger of Kubeflow
Pipelines (kfp-v2beta1.swagger.json). ``breaks`` makes it answer wrongly, as a real one may.
"""

import contextlib
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

SWAGGER = json.loads((Path(__file__).parent / "kfp-v2beta1.swagger.json").read_text())
# As healthzResponse in backend/src/apiserver/main.go (commit 7b70c7b9, 2026-08) has them; the
# description does not.
SWAGGER["definitions"]["v2beta1GetHealthzResponse"]["properties"] |= {
    "tag_name": {"type": "string"},
    "commit_sha": {"type": "string"},
}
MAX_PARAMETER_BYTES = 10000
NOW = "2026-01-01T02:00:00Z"
TAKEN = {
    "STRING": (str,), "LIST": (list,), "STRUCT": (dict,), "BOOLEAN": (bool,),
    "NUMBER_INTEGER": (int, float), "NUMBER_DOUBLE": (int, float),
}  # fmt: skip


def strict(name: str) -> Any:
    """A validator of one definition that refuses unknown fields."""
    definitions = {
        key: {**value, "additionalProperties": False} if "properties" in value else value
        for key, value in SWAGGER["definitions"].items()
        if key != "protobufAny"
    }
    definitions["protobufAny"] = {}
    schema = {"definitions": definitions, "$ref": f"#/definitions/{name}"}
    return jsonschema_rs.Draft7Validator(schema)


class Broken(str):
    """What the server says with 500, of what it should have refused as wrong."""


class Pipelines:
    """The server's state, its faults, and what was asked of it."""

    def __init__(self) -> None:
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.unlisted: set[str] = set()
        """The ids of versions that are there and in no list: objects without the label."""
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurring: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.faults: list[str] = []
        """What in a request the description does not allow."""
        self.breaks: list[int] = []
        """Statuses that the next requests are answered with; 0 hangs up."""
        self.story: list[dict[str, Any]] = []
        """What a run shows each time it is asked for; the last one stays."""
        self.logs: dict[str, str] = {}
        """The log of each pod; what is asked of another is answered as the real one does."""
        self.no_logs = 0
        """A status that every request for a log is answered with; 0 answers them."""
        self.release = "unknown"
        """The release that the server's build names, as TAG_NAME does; "unknown" without one."""
        self.token = "sha256~canary-token"

    async def answer(self, request: Request) -> Response:
        method, path = request.method, request.url.path
        self.asked.append((method, path))
        if self.breaks:
            status = self.breaks.pop(0)
            if status:
                return JSONResponse({"error_message": "as the test says"}, status_code=status)
            time.sleep(3)
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        # Not in the description: the server hands logs out beside it.
        if log := re.fullmatch(r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", path):
            return self._log(log[1], log[2])
        operation, named = self._operation(method, path)
        if operation is None:
            self.faults.append(f"{method} {path} is not in the API")
            return JSONResponse({"error": "no such thing"}, status_code=404)
        self._check_query(operation, request)
        body = await self._body(operation, request)
        result = self._do(operation["operationId"], named, body, dict(request.query_params))
        if isinstance(result, Broken):
            return JSONResponse({"code": 13, "message": str(result)}, status_code=500)
        if isinstance(result, str):
            return JSONResponse({"code": 3, "message": result, "details": []}, status_code=400)
        if isinstance(result, int):
            return JSONResponse({"code": 5, "message": "not found"}, status_code=result)
        schema = operation["responses"]["200"].get("schema", {})
        if "$ref" in schema:
            strict(schema["$ref"].rpartition("/")[2]).validate(result)
        return JSONResponse(result)

    def _log(self, run: str, pod: str) -> Response:
        if self.no_logs:
            return JSONResponse({"error_message": "no logs here"}, status_code=self.no_logs)
        if run not in self.runs or pod not in self.logs:
            message = f"Failed to read logs for run {run}"
            return Response(json.dumps({"error_message": message, "error_details": message}))
        return Response(self.logs[pod], media_type="text/plain")

    def _operation(self, method: str, path: str) -> tuple[Any, dict[str, str]]:
        # Plain paths stand before those with a name in them, as in a router.
        for template in sorted(SWAGGER["paths"], key=lambda each: each.count("{")):
            pattern = re.sub(
                r"\{([\w.]+)\}", lambda m: f"(?P<{m[1].replace('.', '_')}>[^/:]+)", template
            )
            found = re.fullmatch(pattern, path)
            if found and method.lower() in SWAGGER["paths"][template]:
                return SWAGGER["paths"][template][method.lower()], found.groupdict()
        return None, {}

    def _check_query(self, operation: Any, request: Request) -> None:
        known = {p["name"] for p in operation.get("parameters", []) if p["in"] == "query"}
        for name in request.query_params.keys() - known:
            self.faults.append(f"{operation['operationId']}: {name} is no parameter")

    async def _body(self, operation: Any, request: Request) -> Any:
        given = [p for p in operation.get("parameters", []) if p["in"] in ("body", "formData")]
        if not given:
            return None
        if given[0]["in"] == "formData":
            form = await request.form()
            return (await form["uploadfile"].read()).decode()  # type: ignore[union-attr]
        body = await request.json()
        reference = given[0]["schema"].get("$ref", "").rpartition("/")[2]
        if reference:
            for error in strict(reference).iter_errors(body):
                self.faults.append(f"{operation['operationId']}: {error.message}")
        return body

    def _do(self, name: str, at: dict[str, str], body: Any, query: dict[str, str]) -> Any:
        verb = name.partition("_")[2] or name
        if verb.startswith("List"):
            return self._list(verb, at, query)
        if verb == "GetHealthz":
            built = {"tag_name": self.release, "commit_sha": "unknown"}
            return {"multi_user": False, "pipeline_store": "kubernetes", **built}
        if verb == "CreatePipeline":
            return self._add(self.pipelines, "pipeline_id", {**body, "created_at": NOW})
        if verb == "CreateExperiment":
            return self._add(self.experiments, "experiment_id", body)
        if verb == "UploadPipelineVersion":
            if query["name"] in [each["name"] for each in self.versions.values()]:
                return 409
            documents = list(yaml.safe_load_all(body))
            keys = ("pipeline_spec", "platform_spec")
            spec = dict(zip(keys, documents, strict=False))
            fields = {"name": query["name"], "display_name": query["display_name"]}
            fields |= {"pipeline_id": query["pipelineid"], "created_at": NOW}
            return self._add(
                self.versions, "pipeline_version_id", {**fields, "pipeline_spec": spec}
            )
        if verb in ("CreateRun", "CreateRecurringRun") and (refusal := self._refusal(body)):
            return refusal
        if verb == "CreateRun":
            return self._add(self.runs, "run_id", {**body, "state": "PENDING"})
        if verb == "GetRun":
            run = self.runs.get(at["run_id"])
            if run is not None and self.story:
                run.update(self.story.pop(0) if len(self.story) > 1 else self.story[0])
            return 404 if run is None else run
        if verb == "CreateRecurringRun":
            enabled = body.pop("mode") == "ENABLE"
            fields = {**body, "status": "ENABLED" if enabled else "DISABLED"}
            return self._add(self.recurring, "recurring_run_id", fields)
        if verb in ("EnableRecurringRun", "DisableRecurringRun", "DeleteRecurringRun"):
            return self._recurring(verb, at["recurring_run_id"])
        raise AssertionError(f"{name} is not played here")

    def _refusal(self, body: dict[str, Any]) -> str:
        """What the server says of parameters that are not of the version's types; empty if they
        are (backend/src/apiserver/template/v2_template.go, validatePipelineJobInputs)."""
        named = body["pipeline_version_reference"]
        versions = [
            each
            for key, each in self.versions.items()
            if each["pipeline_id"] == named["pipeline_id"]
            and named.get("pipeline_version_id", key) == key
        ]
        spec = versions[-1]["pipeline_spec"]["pipeline_spec"]
        workflow = f"{spec['pipelineInfo']['name']}-7vk7x"
        known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        parameters = body["runtime_config"]["parameters"]
        size = len(json.dumps(parameters, separators=(",", ":")).encode())
        if size > MAX_PARAMETER_BYTES:
            return f"The input parameter length exceed maximum size of {MAX_PARAMETER_BYTES}"
        for name, value in parameters.items():
            if isinstance(value, str):
                if not value.isascii():  # of a table with the character set latin1
                    return Broken("Error 1366: Incorrect string value for column 'Parameters'")
                if "{{inputs.parameters." in value:
                    return Broken(f"failed to resolve {value}")
                # Argo replaces its own words, and leaves others as they are.
                value = value.replace("{{workflow.name}}", workflow)
                parameters[name] = value.replace("{{workflow.uid}}", str(uuid.uuid4()))
        for name, value in parameters.items():
            if name not in known:
                return f"parameter(s) provided are not required by pipeline: {name}"
            if type(value) not in TAKEN[known[name]["parameterType"]]:
                said = (
                    f"input parameter {name} requires type {known[name]['parameterType'].lower()}"
                )
                return f"Failed to create a new run: Invalid input error: {said}, but it is not"
        return ""

    def _recurring(self, verb: str, key: str) -> Any:
        if key not in self.recurring:
            return 404
        if verb == "DeleteRecurringRun":
            for run in self.runs.values():
                if run.get("recurring_run_id") == key and run["state"] == "RUNNING":
                    run["state"] = "CANCELED"  # as the real one does
            del self.recurring[key]
        else:
            self.recurring[key]["status"] = verb.split("Recurring")[0].upper() + "D"
        return {}

    def _list(self, verb: str, at: dict[str, str], query: dict[str, str]) -> dict[str, Any]:
        key, items = {
            "ListPipelines": ("pipelines", self.pipelines),
            "ListPipelineVersions": ("pipeline_versions", self.versions),
            "ListExperiments": ("experiments", self.experiments),
            "ListRuns": ("runs", self.runs),
            "ListRecurringRuns": ("recurringRuns", self.recurring),
        }[verb]
        found = [each for name, each in items.items() if name not in self.unlisted]
        if "pipeline_id" in at:
            found = [each for each in found if each["pipeline_id"] == at["pipeline_id"]]
        if "desc" in query.get("sort_by", ""):
            found.reverse()
        # Pages of two, so that whoever reads one page alone is found out.
        start = int(query.get("page_token") or 0)
        page: dict[str, Any] = {key: found[start : start + 2]}
        if start + 2 < len(found):
            page["next_page_token"] = str(start + 2)
        return page

    def _add(self, items: dict[str, Any], key: str, fields: dict[str, Any]) -> dict[str, Any]:
        made = {**fields, key: str(uuid.uuid4())}
        items[made[key]] = made
        return made


@contextlib.contextmanager
def serving(state: Pipelines, **tls: Any) -> Iterator[str]:
    """The address of the server while the block runs."""
    methods = ["GET", "POST", "DELETE", "PATCH"]
    app = Starlette(routes=[Route("/{path:path}", state.answer, methods=methods)])
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", **tls))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            scheme = "https" if tls else "http"
            yield f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
