"""`nudge compile`: the YAML of the pipelines, and the other generated files."""

import sys
from pathlib import Path

import click

from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli.output import echo


@click.command("compile")
@click.option("--check", is_flag=True, help="Write nothing; fail if a file is out of date.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write only the pipelines, into this folder.",
)
@click.option(
    "--digests",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Pin the images to the digests in this YAML or JSON file (data and train, each as "
    "name@sha256:...); needs --into.",
)
def compile_(check: bool, into: Path | None, digests: Path | None) -> None:
    """Write the pipelines' YAML, the steps' READMEs, and the list of what to mirror.

    Each pipeline is written twice: as YAML for a dashboard's import box, and below kubernetes/ as
    Pipeline and PipelineVersion resources for `oc apply` (here: manifests/pipelines/).
    """
    from nudge.pipelines.compile import compiled, stale, write

    if digests and not into:
        raise UserError(
            "--digests needs --into FOLDER, because the YAML in this repository names no digest"
        )
    if not check:
        files = compiled(into, into / "kubernetes", digests) if into else None
        for path in write(files):
            echo(path)
        return
    if old := stale():
        echo("out of date: " + ", ".join(map(str, old)) + "; run `nudge compile`", err=True)
        sys.exit(1)
    echo("current")
