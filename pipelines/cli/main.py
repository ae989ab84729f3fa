"""The command `nudge`. Nothing heavy is imported before the command that needs it."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sanitize import visible
from nudge.pipelines.cli import cluster as commands
from nudge.pipelines.cli import output, release


class Errors(click.Group):
    """Ends a command with the text of a `UserError` alone, as wrong usage (status 2), and one that
    Ctrl-C ends with status 130."""

    def invoke(self, ctx: click.Context) -> Any:
        output.write_anything()
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:  # click itself would end with 1, as what failed does
            click.echo("stopped", err=True)
            ctx.exit(130)


@click.group(cls=Errors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nudge-lm")
def main() -> None:
    """Retrain a language model on your own text and put it into production.

    Start with `nudge run`: the whole pipeline on this machine, from text to a served model.
    """


@main.command()
@click.argument("recipe", default="eiffel")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a setting of the recipe, such as train.epochs=2. May be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--fresh", is_flag=True, help="Run every step, also those finished before.")
@click.option(
    "--compiled",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Run this compiled YAML in the place of the pipeline's definition.",
)
@click.option(
    "--engine",
    type=click.Choice(["process", "docker"]),
    default="process",
    show_default=True,
    help="docker: each step in its image, from the compiled YAML, as on a cluster.",
)
@click.option(
    "--given",
    is_flag=True,
    help="Use the data connection (AWS_*) and the registry (NUDGE_REGISTRY_URL) that are set, each "
    "in the place of one of its own.",
)
def run(
    recipe: str,
    overrides: tuple[str, ...],
    as_json: bool,
    fresh: bool,
    compiled: Path | None,
    engine: str,
    given: bool,
) -> None:
    """Run the whole pipeline here: ingest, tokenize, train, evaluate, upload, register, deploy.

    RECIPE is the name of a recipe that ships with nudge (`nudge recipes` lists them) or a YAML
    file; the default is eiffel. Steps that finished before on the same input are reused, and a run
    that was cut off while it published its model is gone on with under its own name, if text and
    base model are still the same. The object store, the model registry and the served model run on
    after it: `nudge services down` ends them.

    Exit status: 0 the run ended (promoted or not), 1 it failed, 2 something given was wrong,
    130 Ctrl-C ended it.
    """
    from nudge.components.common.clients.registry.preflight import check_registration
    from nudge.components.common.core.processes import nudge_home
    from nudge.components.register.preflight import check_registry
    from nudge.pipelines.cli import display
    from nudge.pipelines.cli.screen import Screen
    from nudge.pipelines.local import run as local_run
    from nudge.pipelines.local import services
    from nudge.pipelines.recipes import load

    loaded = load(recipe, overrides)
    home = nudge_home()
    console = Screen(stderr=True)
    if given and engine == "docker":
        raise UserError("--given is for --engine process: what serves containers here has its own")
    if engine == "docker":
        from nudge.pipelines.local import containers

        compiled = compiled or containers.COMPILED
        containers.check(compiled)
        containers.check_paths(loaded.text, home)
    else:
        from nudge.pipelines.local import preflight

        preflight.check(loaded.text, given)
    check_registration(loaded.text)
    started = services.up(home, instead=services.given() if given else {})
    check_registry(started["NUDGE_REGISTRY_URL"], loaded.text)
    if unused := services.not_used(started):
        told = f"{', '.join(unused)} {'is' if len(unused) == 1 else 'are'} set and not used"
        click.echo(f"{told}: this run has parts of its own; --given takes those", err=True)
    if not given:  # what was served here before is in the registry of this machine
        services.serve_again(home, started)
    if engine == "docker":
        started |= services.open_serving(home, started)
    current = local_run.begin(loaded, home, fresh=fresh)
    if current.continued:
        click.echo(f"going on with the run {current.run_id}, which was cut off", err=True)
    following = local_run.follow(
        current, home, started, reuse=not fresh, compiled=compiled, engine=engine
    )
    try:
        with display.Live(console, current) as live:
            for now in following:
                if now is not current:
                    console.print(
                        f"{current.run_id} trained another model than this will be, so it stays "
                        f"as it is; this is a new run, {now.run_id}",
                        highlight=False,
                    )
                current = now
                live.show(current)
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # the second one ends it at once
            following.close()
        click.echo(f"stopped; finished steps are kept, the log is {current.log}", err=True)
        sys.exit(130)
    values = local_run.keep_result(current)
    if as_json:
        click.echo(json.dumps(values, indent=2))
    else:
        Screen().print(display.summary(values, current))
        if values["endpoint"]:
            asked = current.steps["deploy"].results["smoke_prompt"]
            line = display.curl(values, asked, nudge_home())
            click.echo(f"\n{visible(line)}")  # a line by itself, never folded
    if values["error"]:
        click.echo(
            f"error: {visible(values['error'])}\n"
            f"the whole log: {current.log}\n"
            "mend it and run the same again: steps that finished are reused",
            err=True,
        )
        sys.exit(1)


@main.command()
def recipes() -> None:
    """List the recipes that ship with nudge."""
    from nudge.pipelines.recipes import shipped

    for name, title in shipped().items():
        click.echo(f"{name:14} {title}")


@main.command("compile")
@click.option("--check", is_flag=True, help="Change nothing; fail if a file is not current.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the pipelines alone, into this folder.",
)
@click.option(
    "--digests",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Pin the images as this file says: data and train, each name@sha256:...; with --into.",
)
def compile_(check: bool, into: Path | None, digests: Path | None) -> None:
    """Write the pipelines' YAML, the steps' READMEs, and what a disconnected cluster mirrors.

    A pipeline is written twice: for a dashboard's import box, and below kubernetes/ as Pipeline and
    PipelineVersion resources for `oc apply` (in this repository: manifests/pipelines/).
    """
    from nudge.pipelines.compile import compiled, stale, write

    if digests and not into:
        raise UserError(
            "--digests needs --into FOLDER: the YAML of this repository names no digest"
        )
    if not check:
        files = compiled(into, into / "kubernetes", digests) if into else None
        for path in write(files):
            click.echo(path)
        return
    if old := stale():
        click.echo("not current: " + ", ".join(map(str, old)) + "; run `nudge compile`", err=True)
        sys.exit(1)
    click.echo("current")


for command in (
    *(release.models, release.register, release.promote, release.split, release.rollback),
    *(commands.upload, commands.submit, commands.schedule, commands.doctor),
):
    main.add_command(command)


@main.group("services")
def services_group() -> None:
    """Start, stop and show the embedded object store, model registry and served models."""


@services_group.command("up")
@click.option("--store-port", type=click.IntRange(1, 65535), help="Default: a free one.")
@click.option("--registry-port", type=click.IntRange(1, 65535), help="Default: a free one.")
def services_up(store_port: int | None, registry_port: int | None) -> None:
    """Start what does not run yet, with its data of last time, and serve what was served."""
    from nudge.components.common.core.processes import nudge_home
    from nudge.pipelines.local import services

    asked = {services.STORE: store_port or 0, services.REGISTRY: registry_port or 0}
    home = nudge_home()
    services.serve_again(home, services.up(home, asked))
    _show_services()


@services_group.command("down")
def services_down() -> None:
    """Stop every part, unless a run is under way; its data stays."""
    from nudge.components.common.core.processes import nudge_home
    from nudge.pipelines.local import services
    from nudge.pipelines.local.run import under_way

    home = nudge_home()
    if runs := under_way(home):
        raise UserError(
            f"{', '.join(runs)} is under way and would not be served without them; wait for its "
            "end, or end it first (Ctrl-C where `nudge run` was started)"
        )
    stopped = services.down(home)
    click.echo("stopped " + ", ".join(stopped) if stopped else "nothing was running")


@services_group.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on stdout.")
def services_status(as_json: bool) -> None:
    """Show what runs, where, and how much memory it holds."""
    _show_services(as_json)


def _show_services(as_json: bool = False) -> None:
    from nudge.components.common.core.processes import nudge_home
    from nudge.pipelines.cli import display
    from nudge.pipelines.local import services

    rows = services.status(nudge_home())
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        display.parts(rows)
    else:
        click.echo("nothing is running; `nudge services up` starts the parts")
