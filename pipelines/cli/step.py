"""`nudge step`: one step by itself, on the artifacts that another step made."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from nudge.components.common.core.errors import UserError
from nudge.pipelines import steps
from nudge.pipelines.cli import connections
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.run import OVERRIDES
from nudge.pipelines.recipes import load


@click.group()
def step() -> None:
    """Run one step on existing artifacts.

    Each step reads the artifacts of earlier steps from folders and writes its own into the folder
    that --into names, one entry per artifact:

    \b
    nudge step ingest --recipe mine.yaml --into made
    nudge step tokenize --recipe mine.yaml --corpus made/corpus --into made
    nudge step train --recipe mine.yaml --tokens made/tokens --into made

    `nudge step NAME --help` lists what a step reads and writes. A step that writes to the object
    store or the model registry uses those that the environment variables name, or else starts the
    embedded ones of this folder.
    """


def _command(each: steps.Step) -> click.Command:
    """The command that runs a step of the table."""
    options: list[click.Parameter] = []
    if each.settings:
        options.append(
            click.Option(
                ["--recipe", "recipe_name"],
                default="eiffel",
                show_default=True,
                help=f"The recipe whose section `{each.section}` has the settings: a name or a "
                "YAML file.",
            )
        )
    for name, about in each.inputs.items():
        path = click.Path(path_type=Path, exists=True)
        options.append(click.Option([_flag(name)], required=True, type=path, help=about))
    for name, about in each.values.items():
        required = name not in each.optional
        default: dict[str, Any] = {} if required else {"default": ""}
        options.append(click.Option([_flag(name)], required=required, help=about, **default))
    if each.outputs:
        writes = ", ".join(each.outputs)
        folder = click.Path(path_type=Path, file_okay=False)
        options.append(
            click.Option(
                ["--into"], required=True, type=folder, help=f"The folder to write {writes} into."
            )
        )
    options.append(
        click.Option(["--json", "as_json"], is_flag=True, help="Print the results as JSON.")
    )

    def run(**arguments: Any) -> None:
        _run(each, arguments)

    made = click.Command(each.name, params=options, callback=run, help=each.about)
    return OVERRIDES(made) if each.settings else made


def _flag(parameter: str) -> str:
    return "--" + parameter.replace("_", "-")


def _run(each: steps.Step, arguments: dict[str, Any]) -> None:
    """Run a step and print its results; raises `UserError` if the step refuses its input."""
    as_json, into = arguments.pop("as_json"), arguments.pop("into", None)
    function = each.plain_function()
    positional: list[Any] = []
    if each.settings:
        loaded = load(arguments.pop("recipe_name"), arguments.pop("overrides"))
        positional.append(each.read_settings(loaded.text))
        positional += each.read_about_run(loaded.text)
    if into:
        outputs = {name: into / name for name in each.outputs}
        if there := [str(path) for path in outputs.values() if path.exists()]:
            raise UserError(f"{', '.join(there)} exists; remove it or name another folder")
        into.mkdir(parents=True, exist_ok=True)
        arguments |= outputs
    if each.services:
        connections.start()
    with contextlib.redirect_stdout(sys.stderr):
        results = function(*positional, **arguments)
    if as_json:
        echo(json.dumps(results, indent=2))
        return
    echo(f"{each.name}: {each.describe(results) or 'done'}")
    for name in each.outputs if into else ():
        echo(f"{name}: {into / name}")
    if uri := results.get("uri"):
        echo(f"uri: {uri}")
    if endpoint := results.get("endpoint"):
        echo(f"endpoint: {endpoint}")


for _each in steps.ALONE.values():
    step.add_command(_command(_each))
