"""Upload a pipeline, start a run of it, and follow the run."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nudge.components.common.clients.registry.preflight import check_parameters
from nudge.components.common.clients.store import open_store
from nudge.components.common.core.errors import UserError, nearest
from nudge.components.common.core.recipe import URI_SCHEMES, portable
from nudge.components.common.core.sanitize import credentials
from nudge.components.common.core.uris import read_text
from nudge.pipelines.cluster import nodes
from nudge.pipelines.cluster.connect import PipelinesServer, run_link
from nudge.pipelines.cluster.logs import Logs
from nudge.pipelines.cluster.waiting import Waiting
from nudge.pipelines.compile import COMPILED
from nudge.pipelines.placement import SIZES
from nudge.pipelines.step_state import StepState

EXPERIMENT = "nudge"
MAX_PARAMETER_BYTES = 10_000
"""The largest size of all parameters of a run together, as JSON: the server's default
(MAX_PARAMETER_BYTES in backend/src/common/util/consts.go), which OpenShift AI does not change."""

POLL_S = 2.0
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
STATES = {
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "CANCELED": "failed",
    "SKIPPED": "skipped",
    "RUNNING": "running",
    "CANCELING": "running",
}


TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "STRING": ("a string, in quotes where YAML would read something else", (str,)),
    "LIST": ("a list, such as [{key: nvidia.com/gpu, operator: Exists}]", (list,)),
    "STRUCT": ("a mapping, such as {zone: a}", (dict,)),
    "BOOLEAN": ("true or false", (bool,)),
    "NUMBER_INTEGER": ("a whole number", (int,)),
    "NUMBER_DOUBLE": ("a number", (int, float)),
}
"""The accepted values of each parameter type, in words and as Python types."""


@dataclass(frozen=True)
class Uploaded:
    """A version of a pipeline on the server; ``fresh`` if this upload created it."""

    pipeline: str
    pipeline_id: str
    version: str
    version_id: str
    fresh: bool


@dataclass
class Following:
    """The current state of a run on the server, as `nudge.pipelines.cli.display` shows it."""

    run_id: str
    link: str
    state: str = "PENDING"
    error: str = ""
    steps: dict[str, StepState] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    """The names that each step's node in the Workflow may have."""
    pods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The names that the pod of each step's newest attempt may have."""
    lines: list[tuple[str, str]] = field(default_factory=list)
    """New log lines since the last poll, each with its step's name."""
    silent: str = ""
    """Why no logs are shown; empty if they are."""
    reasonless: str = ""
    """Why no reasons for waiting are shown; empty if they are."""

    @property
    def failed(self) -> StepState | None:
        """The step that failed; None if none did."""
        return next((step for step in self.steps.values() if step.status == "failed"), None)


def upload(server: PipelinesServer, file: Path) -> Uploaded:
    """Upload a compiled pipeline as a version named by its content, unless the server has it."""
    text = read_text(file)
    name, description = _named(file, text)
    version = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    import kfp_server_api

    pipelines = server.api("PipelineServiceApi")
    entry = find_pipeline(server, name)
    if entry is None:
        fresh = kfp_server_api.V2beta1Pipeline(
            name=name, display_name=name, description=description, namespace=server.namespace
        )
        create = pipelines.pipeline_service_create_pipeline
        entry = server.change(f"create the pipeline {name}", create, fresh)
    for known in versions(server, entry.pipeline_id):
        if known.name == version or known.display_name == version:
            where = (entry.pipeline_id, version, known.pipeline_version_id)
            return Uploaded(name, *where, fresh=False)
    uploads = server.api("PipelineUploadServiceApi")
    try:
        made = server.change(
            f"upload {version}",
            uploads.upload_pipeline_version,
            str(file),
            name=version,
            display_name=version,
            pipelineid=entry.pipeline_id,
            description=description,
        )
    except UserError as error:
        if getattr(error.__context__, "status", 0) != 409:
            raise
        raise UserError(
            f"{error}. If it still fails, {version} was applied before the server was ready, which "
            f"therefore never lists it: run `oc delete pipelineversion {version}`, and upload again"
        ) from None
    return Uploaded(name, entry.pipeline_id, version, made.pipeline_version_id, fresh=True)


def find_pipeline(server: PipelinesServer, name: str) -> Any:
    """The pipeline of this name, or None."""
    listing = server.api("PipelineServiceApi").pipeline_service_list_pipelines
    entries = server.every("list the pipelines", listing, "pipelines", namespace=server.namespace)
    return next((e for e in entries if name in (e.name, e.display_name)), None)


def known_pipeline(server: PipelinesServer, name: str) -> Any:
    """The pipeline of this name; raises `UserError` that names the nearest ones."""
    listing = server.api("PipelineServiceApi").pipeline_service_list_pipelines
    entries = server.every("list the pipelines", listing, "pipelines", namespace=server.namespace)
    names = {str(entry.display_name): entry for entry in entries}
    if name not in names:
        raise UserError(
            f"{server.url} has no pipeline {name!r} (`nudge upload` uploads one); "
            f"{nearest(name, names)}"
        )
    return names[name]


def versions(server: PipelinesServer, pipeline_id: str) -> list[Any]:
    """The versions of a pipeline, newest first."""
    listing = server.api("PipelineServiceApi").pipeline_service_list_pipeline_versions
    found = server.every(
        "list the versions",
        lambda **named: listing(pipeline_id, **named),
        "pipeline_versions",
        sort_by="created_at desc",
    )
    return found


def experiment(server: PipelinesServer, name: str = EXPERIMENT) -> str:
    """The id of the experiment of this name, which is created if it does not exist."""
    import kfp_server_api

    api = server.api("ExperimentServiceApi")
    listing = api.experiment_service_list_experiments
    found = server.every("list the experiments", listing, "experiments", namespace=server.namespace)
    for entry in found:
        if entry.display_name == name:
            return str(entry.experiment_id)
    fresh = kfp_server_api.V2beta1Experiment(display_name=name, namespace=server.namespace)
    create = api.experiment_service_create_experiment
    return str(server.change(f"create the experiment {name}", create, fresh).experiment_id)


def submit(
    server: PipelinesServer, pipeline: str, name: str, parameters: dict[str, Any]
) -> Following:
    """Start a run of the newest version of a pipeline.

    Raises `UserError` if the pipeline does not exist, or if a parameter is unknown or has the wrong
    type.
    """
    import kfp_server_api

    entry = known_pipeline(server, pipeline)
    newest = next(iter(versions(server, entry.pipeline_id)), None)
    if newest is None:
        raise UserError(f"{pipeline} has no version on {server.url}; `nudge upload` uploads one")
    parameters = coerce_parameters(newest, parameters)
    body = kfp_server_api.V2beta1Run(
        display_name=name,
        experiment_id=experiment(server),
        pipeline_version_reference=kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=entry.pipeline_id, pipeline_version_id=newest.pipeline_version_id
        ),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=parameters),
    )
    made = server.change(
        f"start a run of {pipeline}", server.api("RunServiceApi").run_service_create_run, body
    )
    paths = nodes.paths(spec_of(newest))
    steps = {name: StepState(name) for name in paths}
    return Following(made.run_id, run_link(server, made.run_id), steps=steps, paths=paths)


def sendable(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with a recipe that reaches every step unchanged (see `portable`).

    If a recipe is too long for the server, it is stored in the object store of this machine's data
    connection under its hash, and its URI is sent. Raises `UserError` if there is no data
    connection, or if a URI in the parameters has a user, a password or a signed query.
    """
    if found := credentials(
        json.dumps(parameters, ensure_ascii=False, default=str).replace("\\n", "\n")
    ):
        raise UserError(
            f"the parameters contain credentials ({', '.join(found)}), and everybody who can see "
            "the run would see them; put them into the Secret of a data connection (the parameter "
            "`connection`), copy the data into its bucket, and name it there: "
            "data_uri: s3://BUCKET/PATH"
        )
    recipe = parameters.get("recipe")
    if not isinstance(recipe, str):
        return parameters
    made = {**parameters, "recipe": portable(recipe)}
    if sent_bytes(made) <= MAX_PARAMETER_BYTES:
        return made
    if "recipe" in made and recipe.startswith(URI_SCHEMES):
        raise UserError(
            f"the parameters have {sent_bytes(made)} bytes, but the pipelines server accepts only "
            f"{MAX_PARAMETER_BYTES}; shorten them"
        )
    bucket = os.environ.get("AWS_S3_BUCKET", "")
    if not bucket or not os.environ.get("AWS_ACCESS_KEY_ID"):
        raise UserError(
            f"with this recipe the parameters have {sent_bytes(made)} bytes, but the pipelines "
            f"server accepts only {MAX_PARAMETER_BYTES}. Set the variables of the data connection "
            "(AWS_S3_ENDPOINT, AWS_S3_BUCKET, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), and the "
            "recipe is stored there; or pass the URI of a file: -p recipe=s3://<bucket>/<file>"
        )
    return {**made, "recipe": _stored(recipe, bucket)}


def sent_bytes(parameters: dict[str, Any]) -> int:
    """The size of parameters as the server measures it: Go's JSON, which escapes ``<>&`` too."""
    text = json.dumps(parameters, ensure_ascii=False, separators=(",", ":"), default=str)
    return len(text.encode("utf-8")) + 5 * sum(map(text.count, "<>&"))


def _stored(recipe: str, bucket: str) -> str:
    """Put a recipe into the object store; returns its URI."""
    data = recipe.encode("utf-8")
    key = f"nudge/recipes/{hashlib.sha256(data).hexdigest()}.yaml"
    open_store(f"s3://{bucket}").write(key, data)
    return f"s3://{bucket}/{key}"


def coerce_parameters(version: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    """The values converted to the types of this version's parameters, as the server requires.

    A number for a string parameter becomes a string; text for any other type is parsed as YAML.
    Raises `UserError` for an unknown, missing or wrongly typed parameter, and for a value that a
    pipeline with the step `register` could not register.
    """
    known = spec_of(version).get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    for name in parameters.keys() - known.keys():
        if name in ("cpu", "memory") and "size" in known:
            raise UserError(
                f"{version.display_name} no longer has the parameter {name}; set size to one of "
                f"{', '.join(SIZES)}"
            )
        raise UserError(f"{version.display_name} has no parameter {name}; {nearest(name, known)}")
    missing = [
        name
        for name, parameter in known.items()
        if name not in parameters
        and "defaultValue" not in parameter
        and not parameter.get("isOptional")
    ]
    if missing:
        listed = ", ".join(f"{name} ({known[name].get('description', '')})" for name in missing)
        raise UserError(f"{version.display_name} needs {listed}; pass -p NAME=VALUE")
    if "size" in known and (size := parameters.get("size", SIZES[0])) not in SIZES:
        raise UserError(f"size = {size!r}: expected {', '.join(SIZES)}")
    made = {
        name: _coerced(name, value, known[name].get("parameterType", ""))
        for name, value in parameters.items()
    }
    if "register" in nodes.paths(spec_of(version)):
        check_parameters(made)
    return made


def _coerced(name: str, value: Any, type: str) -> Any:
    accepted, kinds = TYPES.get(type, ("", (object,)))
    made = value
    if type == "STRING" and isinstance(value, int | float) and not isinstance(value, bool):
        made = str(value)
    elif type != "STRING" and accepted and isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            made = yaml.safe_load(value)
    # In Python, True and False are numbers.
    if not isinstance(made, kinds) or (isinstance(made, bool) and type.startswith("NUMBER")):
        raise UserError(f"{name} = {value!r}: expected {accepted}")
    return made


def spec_of(version: Any) -> dict[str, Any]:
    """The pipeline's own spec in a version from the server, without that of its platforms."""
    spec = version.pipeline_spec or {}
    return dict(spec.get("pipeline_spec", spec))


def follow(server: PipelinesServer, run: Following, poll_s: float = POLL_S) -> Generator[Following]:
    """Poll the run and the logs of its steps until the run ends; yields it after each poll."""
    api = server.api("RunServiceApi")
    logs = Logs(server, run.run_id)
    waiting = Waiting(run.run_id, server.namespace)
    while True:
        found = server.read(f"get the run {run.run_id}", api.run_service_get_run, run.run_id)
        _update(run, found)
        ended = run.state in ENDED
        active = [step for step in run.steps.values() if step.status in ("waiting", "running")]
        wanted = run.failed if ended else active
        reasons = waiting.reasons(now=ended) if wanted else {}
        for step in run.steps.values():
            step.note = reasons.get(step.name, "") if step in active else ""
            if step is run.failed and step.name in reasons:
                step.error = f"{step.error}: {reasons[step.name]}"
        run.lines = list(logs.lines(run.steps, run.pods))
        run.silent, run.reasonless = logs.problem, waiting.problem
        yield run
        if run.state in ENDED:
            return
        time.sleep(poll_s)


def _update(run: Following, found: Any) -> None:
    run.state = found.state or "PENDING"
    run.error = (found.error and found.error.message) or ""
    tasks = list((found.run_details and found.run_details.task_details) or [])
    for task in tasks:
        # Groups, drivers of steps and their pods are tasks too.
        if (name := str(task.display_name or "")) not in run.steps:
            continue
        step = run.steps[name]
        step.status = STATES.get(str(task.state), "waiting")
        ran = nodes.ran(task, tasks, run.paths.get(name, []))
        if step.status == "done" and not ran.attempts and nodes.cached(task, tasks):
            step.status = "reused"  # from the engine's cache; no pod ran
        step.attempts = max(ran.attempts, 1)
        if task.start_time:
            step.started = task.start_time.timestamp()
        # The end of a running task is in the year 1, that of a run in 1970.
        ended = task.start_time and task.end_time and task.end_time >= task.start_time
        if ended and step.status not in ("waiting", "running"):
            step.seconds = (task.end_time - task.start_time).total_seconds()
        if step.status == "failed":
            step.error = (task.error and task.error.message) or "the step failed"
        if ran.pods:
            run.pods[name] = ran.pods
    if run.state in ENDED:
        for step in run.steps.values():
            step.status = "skipped" if step.status == "waiting" else step.status


def _named(file: Path, text: str) -> tuple[str, str]:
    try:
        spec = next(iter(yaml.safe_load_all(text)))
        return str(spec["pipelineInfo"]["name"]), str(spec["pipelineInfo"].get("description", ""))
    except (yaml.YAMLError, StopIteration, KeyError, TypeError):
        hint = "`nudge compile` writes those"
        raise UserError(f"{file} is not a compiled pipeline; {hint}") from None


def shipped(name: str) -> Path:
    """The compiled YAML of a pipeline by its name; raises `UserError` with the nearest names."""
    path = COMPILED / f"{name.replace('-', '_')}.yaml"
    if not path.is_file():
        hint = nearest(name, [each.stem.replace("_", "-") for each in COMPILED.glob("*.yaml")])
        raise UserError(f"there is no pipeline {name!r} (a file ends in .yaml); {hint}")
    return path
