"""What each pod of a job runs: ``python -m nudge.components.train.cluster.worker EXCHANGE``.

It takes the recipe and the tokens from the exchange and starts this node's ranks with torchrun,
which finds its place among the nodes in the variables PET_* that Kubeflow Trainer sets. The node of
the first rank hands the model, the history and the report back.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from nudge.components.common.core.step import exit_with_user_errors
from nudge.components.train.cluster.handover import Exchange

OUTPUTS = ("model", "history", "report")


def command(folder: Path) -> list[str]:
    """The command line of this node's ranks; inputs and outputs stand in ``folder``."""
    return [
        *(sys.executable, "-P", "-m", "torch.distributed.run"),
        *("-m", "nudge.components.train"),
        *("--recipe", (folder / "recipe").as_uri(), "--tokens", str(folder / "tokens")),
        *(word for name in OUTPUTS for word in (f"--{name}", str(folder / name))),
    ]


@click.command()
@click.argument("uri")
def main(uri: str) -> None:
    """Run this node's ranks of the training whose inputs stand at URI."""
    exchange = Exchange(uri)
    with exit_with_user_errors(), tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("recipe", "tokens"):
            exchange.fetch(name, folder / name)
        ranks = subprocess.Popen(command(folder), env={**os.environ, "PYTHONSAFEPATH": "1"})
        signal.signal(signal.SIGTERM, lambda number, _: ranks.send_signal(number))
        status = ranks.wait()
        if status:
            sys.exit(status if status > 0 else 128 - status)
        if (folder / "model").is_dir():
            for name in OUTPUTS:
                exchange.send(name, folder / name)


if __name__ == "__main__":
    main()
