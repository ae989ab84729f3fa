"""Schedules: the server starts runs of a pipeline at the times that a file configures.

The API cannot change a schedule, and deleting one ends its runs. So a changed file becomes a new
schedule; the old one is disabled, and deleted only when none of its runs is in progress.
"""

import datetime
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from nudge.components.common.core.errors import UserError, nearest
from nudge.components.common.core.recipe import read_yaml
from nudge.components.common.core.settings import parse, settings
from nudge.components.common.core.uris import read_text
from nudge.pipelines.cluster import runs
from nudge.pipelines.cluster.connect import PipelinesServer

MARK = "nudge schedule "
"""Starts the description of a schedule that nudge created; the content's hash follows."""


@settings
class Schedule:
    """The content of a schedule's file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?$")]
    pipeline: str = "train-and-serve"
    version: str = "latest"
    """The name of a version, or ``latest``: each run uses the newest one at that time."""
    recipe: str = ""
    """A recipe that ships with nudge, or a file beside the schedule's; its text is sent as a
    parameter."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    cron: str = ""
    """Six fields, seconds first: ``0 0 2 * * *`` is every night at two."""
    interval_minutes: Annotated[int, Field(ge=0)] = 0
    """Instead of ``cron``: minutes from one start to the next."""
    overlap: Literal["forbid", "allow"] = "forbid"
    """Whether a run may start while the previous one is in progress."""
    catch_up: bool = False
    """Whether the server makes up for every start that it missed while it was down."""
    paused: bool = False


def read_schedule(path: Path) -> Schedule:
    """Read and check a schedule's file; raises `UserError`."""
    from nudge.pipelines.recipes import load

    try:
        values = read_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is a YAML {type(values).__name__}, expected a mapping")
    schedule = parse(Schedule, values, path.name)
    if bool(schedule.cron) == bool(schedule.interval_minutes):
        raise UserError(f"{path}: set either cron or interval_minutes")
    if schedule.cron:
        next_start(schedule.cron)
    if schedule.recipe:
        beside = path.parent / schedule.recipe
        recipe = load(str(beside) if beside.is_file() else schedule.recipe)
        parameters = {**schedule.parameters, "recipe": recipe.text}
        return parse(Schedule, {**asdict(schedule), "parameters": parameters}, path.name)
    return schedule


def next_start(cron: str, after: datetime.datetime | None = None) -> datetime.datetime:
    """When a cron of six fields fires next, in UTC; raises `UserError` if it is not valid."""
    from croniter import CroniterBadCronError, CroniterBadDateError, croniter

    if len(cron.split()) != 6:
        raise UserError(
            f"cron = {cron!r}: expected six fields, seconds first, such as '0 0 2 * * *' for two "
            "o'clock every night"
        )
    try:
        clock = croniter(
            cron, after or datetime.datetime.now(datetime.UTC), second_at_beginning=True
        )
        found = clock.get_next(datetime.datetime)
    except (CroniterBadCronError, CroniterBadDateError) as error:
        raise UserError(f"cron = {cron!r}: {error}") from None
    return datetime.datetime.fromtimestamp(found.timestamp(), datetime.UTC)


def content(schedule: Schedule) -> str:
    """The hash of everything that a schedule says but whether it is paused."""
    values = {key: value for key, value in asdict(schedule).items() if key != "paused"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def apply(server: PipelinesServer, schedule: Schedule) -> tuple[str, Any]:
    """Bring the server to what the file says; returns what was done and the schedule there.

    Done is one of ``created``, ``replaced``, ``unchanged``, ``enabled``, ``paused``. Applying twice
    changes nothing. The new schedule is made switched off, so that a failure on the way leaves the
    old one at work and never both.
    """
    api = server.api("RecurringRunServiceApi")
    mark = MARK + content(schedule)
    there = find(server, schedule.name)
    same = next((each for each in there if (each.description or "") == mark), None)
    others = [each for each in there if each is not same]
    done = "unchanged" if same and not others else "replaced" if others else "created"
    if same is None:
        doing = f"create the schedule {schedule.name}"
        body = _body(server, schedule, mark)
        same = server.change(doing, api.recurring_run_service_create_recurring_run, body)
    for old in others:
        _switch(server, old, on=False)
    if (same.status == "ENABLED") == schedule.paused:
        _switch(server, same, on=not schedule.paused)
        if done == "unchanged":
            done = "paused" if schedule.paused else "enabled"
    for old in others:
        _delete_idle(server, old)
    return done, same


def find(server: PipelinesServer, name: str = "") -> list[Any]:
    """The schedules of this name, or all, by name."""
    listing = server.api("RecurringRunServiceApi").recurring_run_service_list_recurring_runs
    found = server.every(
        "list the schedules", listing, "recurring_runs", namespace=server.namespace
    )
    wanted = [each for each in found if not name or each.display_name == name]
    return sorted(wanted, key=lambda each: (each.display_name, each.status != "ENABLED"))


def pause(server: PipelinesServer, name: str) -> None:
    """Switch a schedule off; its runs go on. Raises `UserError` if there is none."""
    for each in _known(server, name):
        _switch(server, each, on=False)


def delete(server: PipelinesServer, name: str) -> None:
    """Switch a schedule off and delete it; refused while one of its runs is under way."""
    there = _known(server, name)
    for each in there:
        _switch(server, each, on=False)
    busy = [
        run for each in there if not _delete_idle(server, each) for run in _active(server, each)
    ]
    if busy:
        names = ", ".join(str(run.display_name) for run in busy)
        raise UserError(
            f"{name} is switched off and not deleted, because that would end {names}; "
            "delete it when that has ended"
        )


def _known(server: PipelinesServer, name: str) -> list[Any]:
    there = find(server, name)
    if not there:
        names = {str(each.display_name) for each in find(server)}
        raise UserError(f"{server.url} has no schedule {name!r}; {nearest(name, names)}")
    return there


def _switch(server: PipelinesServer, schedule: Any, *, on: bool) -> None:
    """Enable or disable a schedule; its runs that are under way go on.

    The API's description says that to disable "stops a recurring run and all its associated runs".
    The server does not: it sets ``spec.enabled`` of the ScheduledWorkflow, which its controller
    asks only before it starts a new run (kubeflow/pipelines 2.17, resource_manager.go
    ChangeJobMode; scheduled_workflow.go GetNextScheduledEpoch). To delete one does end its runs:
    the ScheduledWorkflow owns their Workflows, which the cluster collects with it.
    """
    if (schedule.status == "ENABLED") == on:
        return
    api = server.api("RecurringRunServiceApi")
    verb = "enable" if on else "disable"
    call = getattr(api, f"recurring_run_service_{verb}_recurring_run")
    server.change(f"{verb} {schedule.display_name}", call, schedule.recurring_run_id)
    schedule.status = "ENABLED" if on else "DISABLED"


def _delete_idle(server: PipelinesServer, schedule: Any) -> bool:
    """Delete a schedule unless one of its runs is under way; returns whether it is gone."""
    if _active(server, schedule):
        return False
    call = server.api("RecurringRunServiceApi").recurring_run_service_delete_recurring_run
    server.change(f"delete {schedule.display_name}", call, schedule.recurring_run_id)
    return True


def _active(server: PipelinesServer, schedule: Any) -> list[Any]:
    listing = server.api("RunServiceApi").run_service_list_runs
    found = server.every(
        "list the runs", listing, "runs", namespace=server.namespace, sort_by="created_at desc"
    )
    mine = [run for run in found if run.recurring_run_id == schedule.recurring_run_id]
    return [run for run in mine if run.state not in runs.ENDED]


def _body(server: PipelinesServer, schedule: Schedule, mark: str) -> Any:
    import kfp_server_api as api

    entry = runs.known_pipeline(server, schedule.pipeline)
    there = runs.versions(server, entry.pipeline_id)
    if schedule.version == "latest":
        wanted = there[:1]
        # Only the pipeline is named; the SDK's own client would refuse that.
        reference = api.V2beta1PipelineVersionReference(pipeline_id=entry.pipeline_id)
    else:
        wanted = [each for each in there if each.display_name == schedule.version]
        if not wanted:
            hint = nearest(schedule.version, [str(each.display_name) for each in there])
            raise UserError(f"{schedule.pipeline} has no version {schedule.version!r}; {hint}")
        reference = api.V2beta1PipelineVersionReference(
            pipeline_id=entry.pipeline_id, pipeline_version_id=wanted[0].pipeline_version_id
        )
    parameters = runs.sendable(schedule.parameters)
    for version in wanted:
        parameters = runs.coerce_parameters(version, parameters)
    if schedule.cron:
        trigger = api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=schedule.cron))
    else:
        seconds = str(schedule.interval_minutes * 60)
        periodic = api.V2beta1PeriodicSchedule(interval_second=seconds)
        trigger = api.V2beta1Trigger(periodic_schedule=periodic)
    return api.V2beta1RecurringRun(
        display_name=schedule.name,
        description=mark,
        experiment_id=runs.experiment(server),
        pipeline_version_reference=reference,
        runtime_config=api.V2beta1RuntimeConfig(parameters=parameters),
        max_concurrency="1" if schedule.overlap == "forbid" else "10",
        no_catchup=not schedule.catch_up,
        trigger=trigger,
        mode="DISABLE",
    )
