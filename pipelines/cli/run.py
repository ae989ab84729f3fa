"""`nudge run`, `nudge ingest` and `nudge recipes`."""

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from nudge.components.common.core.environment import REGISTRY_URL, nudge_home
from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli import display
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.recipes import Recipe, load, shipped
from nudge.pipelines.steps import STEPS

if TYPE_CHECKING:
    from nudge.pipelines.local.run import Run

OVERRIDES = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a setting of the recipe, such as train.epochs=2. Repeat it for more settings.",
)


def complete_recipe(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """The shipped recipes and YAML files that a shell offers."""
    known = [CompletionItem(name) for name in shipped() if name.startswith(begun)]
    return [*known, CompletionItem(begun, type="file")]


RECIPE = click.argument("recipe", default="eiffel", shell_complete=complete_recipe)


@click.command()
@RECIPE
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--fresh", is_flag=True, help="Run every step; reuse no finished step.")
@click.option(
    "--until",
    type=click.Choice(["ingest"]),
    help="Stop after this step. `--until ingest` shows what is read, as `nudge ingest` does.",
)
@click.option(
    "--compiled",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Run this compiled YAML instead of the Python pipeline.",
)
@click.option(
    "--engine",
    type=click.Choice(["process", "docker"]),
    default="process",
    show_default=True,
    help="docker: run each step in its image, from the compiled YAML, as a cluster does.",
)
@click.option(
    "--use-env-services",
    is_flag=True,
    help="Use the object store (AWS_*) and the registry (NUDGE_REGISTRY_URL) that the environment "
    "variables name, instead of embedded ones.",
)
@click.option(
    "--clean",
    is_flag=True,
    help="Apply the retention rules of `nudge clean` after the run, as scheduled runs do.",
)
@click.option("--given", "old_name", is_flag=True, hidden=True)
def run(
    recipe: str,
    overrides: tuple[str, ...],
    as_json: bool,
    fresh: bool,
    until: str | None,
    compiled: Path | None,
    engine: str,
    use_env_services: bool,
    clean: bool,
    old_name: bool,
) -> None:
    """Run the pipeline here: ingest, tokenize, train, evaluate, upload, register, deploy.

    RECIPE is the name of a recipe that ships with nudge (`nudge recipes` lists them) or a YAML
    file; the default is eiffel.

    \b
    nudge run                                  the example, in a few minutes
    nudge run mine.yaml --set train.epochs=2   your recipe, with one setting changed
    nudge run mine.yaml --until ingest         only read the text and show what was dropped

    Finished steps with the same input are reused. If the last run of this recipe was interrupted
    while it published its model, and text and base model are unchanged, that run is resumed under
    its own name. The object store, the model registry and the served model keep running afterwards:
    `nudge services down` stops them.

    Exit status: 0 the run finished (promoted or not), 1 it failed, 2 the input was refused,
    130 Ctrl-C stopped it.
    """
    if until:
        show_ingest(load(recipe, overrides), as_json, None)
        return
    from nudge.pipelines.local.result import keep_result

    loaded = load(recipe, overrides)
    home = nudge_home()
    from_env = use_env_services or old_name
    ended = execute(loaded, home, fresh=fresh, engine=engine, compiled=compiled, from_env=from_env)
    values = keep_result(ended)
    ended.lock.close()
    if clean:
        clean_up(home)
    _report(ended, values, as_json, home)


def clean_up(home: Path) -> None:
    """Apply the retention rules; a fault in them is reported and does not change the run's end."""
    from nudge.pipelines.cli.clean import size
    from nudge.pipelines.local import retention

    try:
        done = retention.apply(home, retention.rules(home))
    except UserError as error:
        echo(f"nothing was cleaned: {error}", err=True)
        return
    if done.removals:
        echo(f"cleaned {len(done.removals)} items, {size(done.frees)}", err=True)


def execute(
    recipe: Recipe,
    home: Path,
    *,
    fresh: bool = False,
    engine: str = "process",
    compiled: Path | None = None,
    from_env: bool = False,
) -> "Run":
    """Run the pipeline with a recipe and show it on stderr until it ends; returns the ended run.

    Raises `UserError` if something is missing before it starts.
    """
    from nudge.pipelines.local import budget, following

    budget.check(recipe, home)
    compiled, variables = _prepare(recipe, home, engine, compiled, from_env)
    current = _begin(recipe, home, fresh)
    follow = following.follow(
        current, home, variables, reuse=not fresh, compiled=compiled, engine=engine
    )
    return _watch(current, follow)


def _prepare(
    recipe: Recipe, home: Path, engine: str, compiled: Path | None, from_env: bool
) -> tuple[Path | None, dict[str, str]]:
    """Check what the run needs and start the services; returns the YAML to run and the variables.

    Raises `UserError` with everything that is missing.
    """
    from nudge.components.register.preflight import check_registry
    from nudge.pipelines.local import preflight, services, serving

    if from_env and engine == "docker":
        raise UserError(
            "--use-env-services works with --engine process only; containers use the embedded "
            "services"
        )
    if engine == "docker":
        from nudge.pipelines.local import containers

        compiled = compiled or containers.COMPILED
        containers.check(compiled)
        containers.check_paths(recipe.text, home)
    preflight.check(recipe.text, from_env, in_containers=engine == "docker")
    started = services.up(home, instead=services.from_environment() if from_env else {})
    check_registry(started[REGISTRY_URL], recipe.text)
    if unused := services.not_used(started):
        verb = "is" if len(unused) == 1 else "are"
        echo(
            f"{', '.join(unused)} {verb} set but not used: this run uses embedded services; "
            "--use-env-services uses the ones in the environment",
            err=True,
        )
    if not from_env:  # models that were served here before are in this machine's registry
        serving.restore(home, started, display.stage)
    if engine == "docker":
        started |= serving.open_to_containers(home, started)
    return compiled, started


def _begin(recipe: Recipe, home: Path, fresh: bool) -> "Run":
    from nudge.pipelines.local import run as local_run

    current = local_run.begin(recipe, home, fresh=fresh)
    if current.continued:
        echo(f"resuming the run {current.run_id}, which was interrupted", err=True)
    return current


def _watch(current: "Run", follow: Any) -> "Run":
    """Show the run until it ends; returns the run that ended, which may be a new one."""
    console = Screen(stderr=True)
    try:
        with display.Live(console, current) as live:
            for now in follow:
                if now is not current:
                    console.print(
                        f"{current.run_id} trained a different model, so it is left unchanged; "
                        f"this is a new run, {now.run_id}",
                        highlight=False,
                    )
                current = now
                live.show(current)
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends it at once
            follow.close()
        raise KeyboardInterrupt(
            f"stopped; finished steps are kept, and the log is {current.log}\n"
            "rerun the same command to go on from there"
        ) from None
    return current


def _report(current: "Run", values: dict[str, Any], as_json: bool, home: Path) -> None:
    """Print the result of an ended run; ends the process with status 1 if it failed."""
    if as_json:
        echo(json.dumps(values, indent=2))
    else:
        Screen().print(display.summary(values, current))
        for line in display.ways_on(values, current, home):
            echo(line)  # on a line of its own, never folded
    if values["error"]:
        echo(
            f"error: {values['error']}\n"
            f"the full log: {current.log} (`nudge logs {current.run_id}`)\n"
            "Fix the problem and rerun the same command; finished steps are reused",
            err=True,
        )
        sys.exit(1)


@click.command()
@RECIPE
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the corpus and the report in this folder; default: they are removed.",
)
def ingest(recipe: str, overrides: tuple[str, ...], as_json: bool, into: Path | None) -> None:
    """Read the text of RECIPE and show what was kept and what was dropped, without training.

    \b
    nudge ingest mine.yaml                     a table: read, kept, held out, dropped by reason
    nudge ingest mine.yaml --json              the same for a script
    nudge ingest mine.yaml --into looked-at    keep the corpus and its report

    No service is started and nothing outside the folder changes. Exit status: 0 the text can be
    used, 2 it was refused; the message names the setting to change.
    """
    show_ingest(load(recipe, overrides), as_json, into)


def show_ingest(recipe: Recipe, as_json: bool, into: Path | None) -> None:
    """Run the step `ingest` of a recipe and print what it read; raises `UserError` if refused."""
    from nudge.components.common.artifacts.corpus import read_corpus
    from nudge.components.common.artifacts.schema import plain
    from nudge.components.common.preflight.checks import Way, preflight
    from nudge.components.ingest.account import check_held_out, with_hints

    preflight(recipe.text, Way.INGEST)
    step = STEPS["ingest"]
    # The registry and the state of earlier runs are not this command's to ask or to change.
    settings = dataclasses.replace(step.read_settings(recipe.text), only_new=False, state_uri="")
    with contextlib.ExitStack() as stack:
        made = into or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nudge-")))
        function: Callable[..., dict[str, Any]] = step.plain_function()
        result = function(settings, corpus=made / "corpus", report=made / "report.html")
        counts = plain(read_corpus(made / "corpus"))
        check_held_out(result, settings)
    values = {
        "recipe": recipe.name,
        "documents": {
            "read": result["read"],
            "kept": result["documents"],
            "held_out": result["validation_documents"],
        },
        "conversations": result["conversations"],
        "dropped": result["dropped"],
        "mix": counts.get("mix", []),
        "bytes": result["bytes"],
        "files": result["objects"],
        "fingerprint": result["fingerprint"],
        "corpus": str(into / "corpus") if into else None,
        "report": str(into / "report.html") if into else None,
    }
    if as_json:
        echo(json.dumps(values, indent=2))
        return
    shown = {reason: with_hints(counts, reason) for reason in result["dropped"]}
    Screen().print(display.ingested(values, shown))


@click.command()
def recipes() -> None:
    """List the recipes that ship with nudge.

    `nudge run NAME` runs one. To make your own, copy the YAML file of one and change it.
    """
    for name, title in shipped().items():
        echo(f"{name:14} {title}")
