"""``python -m nudge.pipelines.local.registry --database FILE --port PORT --token-file FILE``."""

import contextlib
from pathlib import Path
from typing import Any

import click
import uvicorn

from nudge.components.common.local.guard import Guard
from nudge.components.common.local.state_file import Damaged
from nudge.pipelines.local.registry.app import VERSIONS, create_app
from nudge.pipelines.local.registry.copy import keep_copy


@click.command()
@click.option("--database", type=click.Path(path_type=Path), required=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, required=True)
@click.option("--token-file", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--collation",
    type=click.Choice(["postgresql", "mariadb"]),
    default="postgresql",
    show_default=True,
    help="Compare names as this database does; MariaDB ignores case and accents.",
)
@click.option(
    "--api",
    "versions",
    type=click.Choice(VERSIONS),
    multiple=True,
    default=VERSIONS,
    show_default=True,
    help="An API version to serve. Repeat the option for more.",
)
def main(
    database: Path,
    host: str,
    port: int,
    token_file: Path,
    collation: Any,
    versions: tuple[str, ...],
) -> None:
    """Serve the Model Registry API over a SQLite file to clients that have the token."""
    try:
        keep_copy(database)
    except Damaged as error:
        raise click.ClickException(str(error)) from None
    app = Guard(create_app(database, collation, versions), token_file.read_text(encoding="utf-8"))
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning")
    finally:
        with contextlib.suppress(Damaged):
            keep_copy(database)


if __name__ == "__main__":
    main()
