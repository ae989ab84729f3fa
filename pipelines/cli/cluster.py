"""The commands that use a pipelines server: upload and submit."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from nudge.components.common.core.errors import UserError
from nudge.components.common.preflight.pod import TrainingPod, job_pod, sized_pod
from nudge.pipelines.cli import display
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.plan.check import check_submitted
from nudge.pipelines.recipes import load
from nudge.pipelines.steps import STEPS

URL = click.option("--url", default="", help="The pipelines server; default: NUDGE_PIPELINES_URL.")


@click.command()
@click.argument("pipeline", default="train-and-serve")
@URL
def upload(pipeline: str, url: str) -> None:
    """Upload a pipeline, or a new version of it, to the pipelines server.

    PIPELINE is the name of a pipeline that ships with nudge or a compiled YAML file; the default is
    train-and-serve. A version is named after its content, so uploading the same file twice changes
    nothing.
    """
    from nudge.pipelines.cluster import connect, runs

    file = Path(pipeline) if pipeline.endswith((".yaml", ".yml")) else runs.shipped(pipeline)
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    uploaded = runs.upload(connect.connect(url), file)
    state = "uploaded" if uploaded.fresh else "exists already"
    echo(f"{uploaded.version} {state}")


@click.command()
@click.argument("recipe", default="eiffel")
@click.option("--pipeline", default="train-and-serve", help="The pipeline's name on the server.")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a setting of the recipe, as in `nudge run`.",
)
@click.option(
    "--parameter",
    "-p",
    "parameters",
    metavar="NAME=VALUE",
    multiple=True,
    help="A parameter of the pipeline, such as gpu_count=2; write lists and mappings as YAML.",
)
@click.option("--name", default="", help="The run's name; default: the recipe's.")
@click.option("--no-follow", is_flag=True, help="Start the run and return.")
@URL
def submit(
    recipe: str,
    pipeline: str,
    overrides: tuple[str, ...],
    parameters: tuple[str, ...],
    name: str,
    no_follow: bool,
    url: str,
) -> None:
    """Start a run of the newest version on the pipelines server, and follow it.

    RECIPE is the name of a recipe or a YAML file, as in `nudge run`; its text travels with the run.

    \b
    nudge upload                                  once, and after each change of nudge
    nudge submit mine.yaml -p gpu_count=2

    A recipe that states its hardware (`plan.gpus`, or `train.cluster`) is refused if it does not
    fit there; `nudge plan` shows why.

    Exit status: 0 the run succeeded (or was started, with --no-follow), 1 it did not succeed,
    2 the input was refused. Ctrl-C stops following; the run continues.
    """
    from nudge.components.common.preflight.checks import Way, preflight
    from nudge.pipelines.cluster import connect, runs

    loaded, values = load(recipe, overrides), _parameters(parameters)
    train = STEPS["train"].read_settings(loaded.text)
    # `runs.submit` checks the names, if the pipeline registers.
    preflight(
        loaded.text,
        Way.SUBMIT,
        lora_targets=train.lora_targets,
        base_model=values.get("base_model", ""),
        pod=_pod(pipeline, train, values),
        publishes=False,
    )
    base = values.get("base_model")
    planned = load(recipe, (*overrides, f"base_model={base}")) if base else loaded
    if line := check_submitted(planned.name, planned.text):
        echo(line, err=True)
    values = runs.sendable({"recipe": loaded.text, **values})
    server = connect.connect(url)
    run = runs.submit(server, pipeline, name or loaded.name, values)
    echo(f"{run.run_id} {run.link}")
    if no_follow:
        return
    try:
        with display.Live(Screen(stderr=True), run) as live:
            for current in runs.follow(server, run):
                live.show(current)
                live.lines(current.lines)
    except KeyboardInterrupt:
        echo(f"stopped following; the run continues: {run.link}", err=True)
        sys.exit(130)
    except UserError as error:
        raise UserError(f"{error}; stopped following, the run continues: {run.link}") from None
    if run.silent:
        echo(f"no logs are available: {run.silent}", err=True)
    if run.reasonless:
        echo(f"the reasons why steps wait are not available: {run.reasonless}", err=True)
    Screen().print(display.followed(run))
    Screen().print(display.outcome(run, run.link))
    echo(run.state.lower())
    if run.state != "SUCCEEDED":
        failed = run.failed
        reason = f"error: {failed.name}: {failed.error}" if failed else run.error
        echo(reason, err=True)
        if failed and (pods := run.pods.get(failed.name)):
            echo(f"its log: oc logs {pods[0]} -c main", err=True)
        sys.exit(1)


def _pod(pipeline: str, train: Any, values: dict[str, str]) -> TrainingPod:
    """The pods that train; unknown for a pipeline of somebody's own."""
    from nudge.pipelines.placement import PARAMETERS, training_memory

    if pipeline == "train-and-serve":
        given = {name: values.get(name, PARAMETERS[name][1]) for name in ("size", "gpu_count")}
        return sized_pod(training_memory(), given["size"], given["gpu_count"])
    if pipeline != "distributed-training":
        return TrainingPod()
    stated = {name: values[name] for name in ("nodes", "gpus_per_node") if values.get(name)}
    return job_pod({**dataclasses.asdict(train.cluster), **stated})


def _parameters(items: tuple[str, ...]) -> dict[str, str]:
    values = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not name or not equals:
            raise UserError(f"--parameter {item}: expected name=value, such as gpu_count=2")
        values[name] = text
    return values
