"""`nudge export`: a registered version as a folder, an adapter or a GGUF file."""

import shutil
import tempfile
from pathlib import Path

import click

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import published
from nudge.components.common.core.sanitize import visible
from nudge.pipelines.cli import connections
from nudge.pipelines.cli.connections import MODEL


@click.command()
@click.argument("version")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@MODEL
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "adapter", "gguf"]),
    default="hf",
    show_default=True,
    help="hf: the Hugging Face folder. adapter: only LoRA's adapter, as peft loads it. gguf: one "
    "file for llama.cpp.",
)
def export(version: str, folder: Path, model: str, kind: str) -> None:
    """Write the registered VERSION of a model into FOLDER, which must not exist.

    The files are checked against the registered upload. A GGUF file is loaded again, and its
    next-token probabilities may differ from the folder's by at most 0.02.

    \b
    nudge export v3 ./my-model
    nudge export v3 ./my-model-gguf --format gguf
    """
    from nudge.components.common.clients.registry.releases import find_version
    from nudge.components.common.models.base_model import download_model, verify_upload

    if folder.exists():
        raise UserError(f"{folder} already exists; name a folder that does not")
    with connections.registry() as ask:
        name = connections.model_name(ask, model)
        found = ask(find_version(name, version))
    connections.start()
    with tempfile.TemporaryDirectory(prefix="nudge-export-") as temporary:
        source = Path(temporary) / "model"
        source.mkdir()
        click.echo(visible(f"downloading {found.uri}"), err=True)
        download_model(found.uri, source)
        verify_upload(source, found.uri)
        written = write(source, folder, kind, f"{name}-{version}")
    click.echo(visible(written))


def write(source: Path, folder: Path, kind: str, name: str) -> str:
    """Write the model folder ``source`` as ``kind`` into ``folder``; returns what was written."""
    if kind == "adapter" and not (source / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"{name} has no adapter, because it was not trained with train.mode: lora; export it "
            "with --format hf"
        )
    with published(folder) as part:
        if kind == "gguf":
            from nudge.components.common.models.gguf_file import write_gguf

            path = part / f"{name}.gguf"
            difference = write_gguf(source, path, lambda stage: click.echo(stage, err=True))
            size = path.stat().st_size / 1e6
            text = f"{folder / path.name}: {size:,.1f} MB, largest difference of a probability "
            return text + f"{difference:.4f}"
        shutil.copytree(
            source / "adapter" if kind == "adapter" else source, part, dirs_exist_ok=True
        )
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    return f"{folder}: {len(files)} files, {size:,.1f} MB"
