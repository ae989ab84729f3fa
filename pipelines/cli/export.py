"""`nudge export`: a registered version as a folder, an adapter or a GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli import connections
from nudge.pipelines.cli.connections import MODEL
from nudge.pipelines.cli.output import echo

if TYPE_CHECKING:
    from nudge.pipelines.local.export import Kind


@click.command()
@click.argument("version", shell_complete=connections.complete_version)
@click.argument("folder", type=click.Path(path_type=Path))
@MODEL
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "adapter", "gguf"]),
    default="hf",
    show_default=True,
    help="hf: the Hugging Face folder. adapter: only LoRA's adapter, for peft and vLLM. gguf: one "
    "file for llama.cpp and programs built on it, such as Ollama.",
)
def export(version: str, folder: Path, model: str, kind: "Kind") -> None:
    """Write the registered VERSION of a model into FOLDER, which must not exist yet.

    Every file is checked against the registry. A GGUF file is loaded again and kept only if its
    next-token probabilities differ from the model's by at most 0.02.

    \b
    nudge export ffc6 ./my-model
    nudge export ffc6 ./my-model-gguf --format gguf
    """
    from nudge.components.common.clients.registry.releases import find_version
    from nudge.pipelines.local.export import export_version

    if folder.exists():
        raise UserError(f"{folder} already exists; name a folder that does not")
    with connections.registry() as ask:
        name = connections.model_name(ask, model)
        found = ask(find_version(name, connections.version_name(ask, name, version)))
    connections.start()
    echo(export_version(found, folder, kind, lambda stage: echo(stage, err=True)))
