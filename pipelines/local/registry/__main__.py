"""``python -m nudge.pipelines.local.registry --database FILE --host HOST --port PORT``."""

from pathlib import Path

import click
import uvicorn
from nudge.pipelines.local.registry.app import create_app


@click.command()
@click.option("--database", type=click.Path(path_type=Path), required=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, required=True)
def main(database: Path, host: str, port: int) -> None:
    """Serve the Model Registry API over a SQLite file."""
    uvicorn.run(create_app(database), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    main()
