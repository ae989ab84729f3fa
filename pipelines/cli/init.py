"""`nudge init`: a recipe from a folder of text."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.recipe import read_recipe
from nudge.pipelines.cli.output import echo
from nudge.pipelines.recipes import check

if TYPE_CHECKING:
    from nudge.pipelines.local.first_recipe import Text


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--base-model",
    default="",
    help="The model to start from: a folder, a .gguf file, hf://owner/name or s3://...; default: "
    "the small model of the recipe eiffel.",
)
@click.option(
    "--into",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The recipe's file; default: the folder's name with .yaml, in the current directory.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
def init(folder: Path, base_model: str, file: Path | None, force: bool) -> None:
    """Write a commented recipe for the text in FOLDER.

    \b
    nudge init my-texts            reads the folder and writes my-texts.yaml
    nudge run my-texts.yaml        trains on it

    The folder is read as `nudge run` reads it: the recipe says how many documents are kept, how
    many are held out, and about how long a run takes on this machine.
    """
    from nudge.pipelines.local import first_recipe

    file = file or Path(f"{folder.resolve().name or 'mine'}.yaml")
    if file.exists() and not force:
        raise UserError(f"{file} exists; --force replaces it, --into FILE writes another one")
    text = first_recipe.examine(folder)
    base_model = base_model or first_recipe.default_base_model()
    duration = _duration(text, base_model)
    recipe = first_recipe.write(folder, text, base_model, duration)
    check(read_recipe(recipe))
    write_atomic(file, recipe)
    echo(f"wrote {file}")
    if text.documents:
        echo(
            f"{text.documents} documents, {text.validation_documents} of them held out; {duration}"
        )
    echo(f"next: nudge ingest {file}, then nudge run {file}")


def _duration(text: "Text", base_model: str) -> str:
    from nudge.pipelines.local import first_recipe

    count = first_recipe.parameters(base_model)
    tokens = first_recipe.tokens_in(text, base_model) if count else None
    if not count or not tokens:
        return "unknown: the base model is not on this machine, or the text was not read"
    seconds = first_recipe.training_s(tokens, count)
    minutes = seconds / 60
    amount = f"about {minutes:.0f} min" if minutes < 90 else f"about {minutes / 60:.1f} hours"
    return (
        f"{amount if minutes > 1 else 'under a minute'} of training on this machine "
        f"({tokens:,} tokens, {first_recipe.short(count)} parameters); reading, evaluating and "
        "serving add to it"
    )
