"""`nudge trace`: which corpora, runs and versions learned a document."""

import json
import shlex
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from nudge.components.common.core.environment import nudge_home
from nudge.pipelines.cli.output import echo
from nudge.pipelines.cli.screen import Screen

if TYPE_CHECKING:
    from nudge.pipelines.local.tracing import Found

SHOWN_DIGITS, SHOWN_DIGESTS = 16, 10


@click.command()
@click.argument("document")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list on stdout.")
def trace(document: str, as_json: bool) -> None:
    """List the runs and versions that learned DOCUMENT: a file, an id, a sha256, or the text.

    \b
    nudge trace letters/2024-03.txt
    nudge trace sha256:0123456789abcdef
    nudge trace "a sentence of at least twenty characters from it"

    A document counts if a run's corpus has it, after cleaning. "train" means that the run's model
    learned it; "validation" that the model was only judged with it. Versions that continued from
    the weights of one that learned it are listed too. Near duplicates are other documents.

    Exit status: 0 it was found, 1 no run here had it.
    """
    from nudge.pipelines.local import tracing

    looked_for = tracing.wanted(document)
    found = tracing.trace(nudge_home(), looked_for)
    if as_json:
        echo(json.dumps(tracing.plain(found), indent=2))
    elif found:
        _show(found)
    else:
        echo(f"no run in {nudge_home()} had this document", err=True)
    if not found:
        raise SystemExit(1)


def _show(found: "list[Found]") -> None:
    table = Table()
    for column in ("run", "version", "state", "split", "document"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, ...], list[Found]] = {}
    for each in found:
        key = (each.run_id, each.version, each.split, each.through, each.source)
        groups.setdefault(key, []).append(each)
    for rows in groups.values():
        row = rows[0]
        version = f"{row.model} {row.version}" if row.version else ""
        split = f"train, through {row.through}" if row.through else row.split
        document = f"{row.id} of {row.source}\nsha256:{row.sha256[:SHOWN_DIGITS]}"
        if len(rows) > 1:
            document = f"{len(rows)} documents of {row.source}"
        table.add_row(row.run_id, *(Text(each) for each in (version, row.state, split, document)))
    Screen().print(table)
    learned = sorted({row.version for row in found if row.version and row.split == "train"})
    echo(f"versions that learned it: {', '.join(learned) or 'none'}")
    digests = sorted({f"sha256:{row.sha256[:SHOWN_DIGITS]}" for row in found})
    sources = {row.source for row in found}
    # A file with many documents is named itself.
    entries = sorted(sources) if len(digests) > SHOWN_DIGESTS and len(sources) == 1 else digests
    value = f"ingest.forget=[{', '.join(entries)}]"
    recipe = next((nudge_home() / "runs" / row.run_id / "recipe.yaml" for row in found), None)
    echo(f"to keep it out from now on, in the recipe: {value.replace('=', ': ')}")
    if learned and recipe and recipe.is_file():
        again = ["nudge", "run", str(recipe), "--fresh", "--set", value]
        if base := _first_base(recipe.read_text("utf-8", "replace")):
            again += ["--set", f"base_model={base}"]
        echo(f"to train without it: {shlex.join(again)}")


def _first_base(recipe: str) -> str:
    """The base model to start from instead of the served version, which learned the document; empty
    if the recipe does not start from that."""
    from nudge.components.common.core.errors import UserError
    from nudge.components.common.core.recipe import read_recipe

    try:
        base = str(read_recipe(recipe).get("base_model") or "")
    except UserError:
        return ""
    return base.partition("?else=")[2] if base.startswith("incumbent://") else ""
