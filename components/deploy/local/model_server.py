"""``python -P -m nudge.components.deploy.local.model_server MODEL --port PORT --token-file FILE``.

`transformers serve` for one model on the CPU, behind a `Guard`: its own command asks for no token.
"""

from pathlib import Path
from typing import Any

import click

from nudge.components.common.local.guard import Guard


@click.command()
@click.argument("model")
@click.option("--port", type=int, required=True)
@click.option("--token-file", type=click.Path(path_type=Path, exists=True), required=True)
def main(model: str, port: int, token_file: Path) -> None:
    """Serve MODEL on 127.0.0.1 to whoever has the token."""
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    token = token_file.read_text(encoding="utf-8")
    build = server.build_server

    def guarded(*args: Any, **kwargs: Any) -> Guard:
        return Guard(build(*args, **kwargs), token)

    server.build_server = guarded
    # In float32, as evaluation scores it: on a CPU without bfloat16 instructions, products in
    # bfloat16 are many times slower.
    Serve(force_model=model, host="127.0.0.1", port=port, device="cpu", dtype="float32")


if __name__ == "__main__":
    main()
