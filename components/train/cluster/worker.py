"""The command of each pod of a job: ``python -m nudge.components.train.cluster.worker HANDOVER``.

It fetches the recipe and the tokens from the handover folder and starts this node's ranks with
torchrun, which finds its position among the nodes in the variables PET_* that Kubeflow Trainer
sets. The node of the first rank sends back the model, the history and the report.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from nudge.components.common.core.environment import KUBERNETES
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.step import exit_with_user_errors
from nudge.components.common.local.child_environment import RANK_CHILD, child_environment
from nudge.components.common.spending.budget import OverBudget
from nudge.components.train.cluster.handover import Handover
from nudge.components.train.torchrun import ERROR_VARIABLE, reported_error

OUTPUTS = ("model", "history", "report")

PERMANENT: dict[int, type[UserError]] = {each.status: each for each in (UserError, OverBudget)}
"""The exit statuses after errors that the same job would meet each time."""
TRY_AGAIN = 75
"""The exit status after a `Transient` (EX_TEMPFAIL of sysexits.h): a restart may succeed."""

MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")
"""The container's counters; ``oom_kill`` counts processes that the kernel killed for memory."""


def command(folder: Path) -> list[str]:
    """The command line of this node's ranks, with inputs and outputs in ``folder``."""
    return [
        *(sys.executable, "-P", "-m", "torch.distributed.run"),
        *("-m", "nudge.components.train"),
        *("--recipe", (folder / "recipe").as_uri(), "--tokens", str(folder / "tokens")),
        *(word for name in OUTPUTS for word in (f"--{name}", str(folder / name))),
    ]


@click.command()
@click.argument("uri")
def main(uri: str) -> None:
    """Run this node's ranks of the training whose inputs are in the folder URI."""
    handover = Handover(uri)
    with exit_with_user_errors(TRY_AGAIN), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("recipe", "tokens"):
            handover.fetch(name, folder / name)
        run_ranks_here(folder)
        if (folder / "model").is_dir():
            for name in OUTPUTS:
                handover.send(name, folder / name)


def run_ranks_here(folder: Path) -> None:
    """Run this node's ranks; SIGTERM is passed on to them.

    Raises the error that a rank reported (see `nudge.components.train.torchrun.KINDS`). Ends the
    process with torchrun's status where no rank reported one.
    """
    error, killed_before = folder / "error", _killed_for_memory()
    variables = child_environment((*RANK_CHILD, KUBERNETES), {ERROR_VARIABLE: str(error)})
    ranks = subprocess.Popen(command(folder), env=variables)
    signal.signal(signal.SIGTERM, lambda number, _: ranks.send_signal(number))
    status = ranks.wait()
    if not status:
        return
    if reported := reported_error(error):
        raise reported
    if _killed_for_memory() > killed_before:
        raise UserError(
            "the kernel killed a rank because this node's memory ran out; raise "
            "train.cluster.memory, or lower train.micro_batch_sequences"
        )
    sys.exit(status if status > 0 else 128 - status)


def _killed_for_memory() -> int:
    try:
        lines = MEMORY_EVENTS.read_text(encoding="utf-8").splitlines()
    except OSError:  # cgroups of version 1, or none
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


if __name__ == "__main__":
    main()
