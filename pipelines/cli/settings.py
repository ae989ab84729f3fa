"""`nudge settings`: what each key of a recipe means."""

import json
from dataclasses import asdict
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.table import Table
from rich.text import Text

from nudge.components.common.core.aliases import ALIASES, meant
from nudge.components.common.core.errors import UserError, nearest
from nudge.pipelines.cli.output import echo, echo_json
from nudge.pipelines.cli.screen import Screen
from nudge.pipelines.settings_reference import Row, recipe_schema, reference


def _complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    rows = reference()
    names = [*rows, *(row.key for each in rows.values() for row in each)]
    return [CompletionItem(name) for name in names if name.startswith(begun)]


@click.command()
@click.argument("name", default="", metavar="[STEP|KEY]", shell_complete=_complete)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list on stdout.")
@click.option("--schema", is_flag=True, help="Print the recipes' JSON Schema, for an editor.")
def settings(name: str, as_json: bool, schema: bool) -> None:
    """Explain the keys of a recipe: type, default, limits, unit and meaning.

    \b
    nudge settings                       the sections and their keys
    nudge settings train                 every key of a step
    nudge settings train.learning_rate   one key; `learning_rate` and `lr` find it too

    Set a key in a recipe's YAML file, or for one run with `--set train.learning_rate=2e-4`.
    docs/settings.md has the same as a page.
    """
    if schema:
        echo(json.dumps(recipe_schema(), indent=1))
        return
    rows = find(name)
    if as_json:
        echo_json([asdict(row) for row in rows])
    elif not name:
        _overview()
    elif len(rows) == 1:
        _one(rows[0])
    else:
        _several(rows)


def find(name: str) -> list[Row]:
    """The settings of a step, of a mapping such as ``deploy.kserve``, or with this key.

    ``name`` is a section, a dotted key, the last part of one, or another word for it. Raises
    `UserError` with the nearest keys.
    """
    sections = reference()
    every = [row for rows in sections.values() for row in rows]
    if not name:
        return every
    if name in sections:
        return sections[name]
    known = {row.key: row for row in every}
    exact = [
        row for row in every if row.key == name or row.key.startswith((f"{name}.", f"{name}["))
    ]
    if exact:
        return exact
    section, _, key = name.rpartition(".")
    own = [row for row in every if not section or row.key.startswith(f"{section}.")]
    last = {row.key.rpartition(".")[2]: row for row in own}
    wanted = [key] if key in last else meant(key, last)
    if found := [row for row in own if row.key.rpartition(".")[2] in wanted]:
        return found
    raise UserError(f"there is no step or setting {name!r}; {nearest(name, [*sections, *known])}")


def _overview() -> None:
    table = Table(show_header=False, box=None)
    for section, rows in reference().items():
        keys = [row.key.partition(".")[2] for row in rows]
        table.add_row(section, Text(", ".join(keys), overflow="fold"))
    Screen().print(table)
    echo("\n`nudge settings STEP` explains the keys of a step, `nudge settings KEY` one key")


def _one(row: Row) -> None:
    _, _, last = row.key.rpartition(".")
    shown: dict[str, Any] = {
        "type": _plain(row.type),
        "default": _plain(row.default) or "none",
        "unit": row.unit,
        "meaning": _plain(row.meaning),
        "also known as": ", ".join(ALIASES.get(last, ())),
        "set it": f"--set {row.key}=VALUE" if "[]" not in row.key else "",
    }
    echo(row.key)
    table = Table(show_header=False, box=None)
    for name, value in shown.items():
        if value:
            table.add_row(name, Text(value, overflow="fold"))
    Screen().print(table)


def _several(rows: list[Row]) -> None:
    table = Table()
    for column in ("key", "type", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (row.key, _plain(row.type), _plain(row.default), _plain(row.meaning))
        table.add_row(*(Text(cell) for cell in cells))
    Screen().print(table)


def _plain(markdown: str) -> str:
    """A cell of the page without its Markdown."""
    return markdown.replace("\\|", "|").replace("`", "")
