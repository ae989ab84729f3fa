"""Several ranks on this machine: the step starts them with torchrun.

They find each other through files in a folder of this user. torchrun's own store is a server on all
addresses of the machine without a password, and torchrun unpickles what is in it: whoever connects
runs code as this user.

Each rank runs ``python -m nudge.components.train`` (see `nudge.components.train.__main__`). A
cluster's launcher starts the same command on each node.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import psutil

from nudge.components.common.core.environment import usable_cores
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.local.child_environment import RANK_CHILD, child_environment
from nudge.components.common.spending.budget import OverBudget
from nudge.components.train.limits import NO_LIMITS, Limits
from nudge.components.train.settings import TrainSettings

ERROR_VARIABLE = "NUDGE_ERROR_FILE"
"""Names the file to which a rank that ends with a `UserError` appends the message."""
KINDS: dict[str, type[UserError]] = {".transient": Transient, ".over-budget": OverBudget}
"""The suffix of an empty file beside it, by the kind of error; a plain `UserError` has none."""
STORE_VARIABLE = "NUDGE_RANKS_STORE"
"""Names the file through which the ranks of one machine find each other."""
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def processes_wanted(settings: TrainSettings) -> int:
    """The number of ranks to start on this machine; 0 if this process itself trains."""
    if "WORLD_SIZE" in os.environ:  # this process already is a rank
        return 0
    count = settings.processes
    if count == 0:
        import torch

        count = torch.cuda.device_count()
    return count if count > 1 else 0


def run_ranks(
    count: int, settings: TrainSettings, paths: dict[str, Path], limits: Limits = NO_LIMITS
) -> None:
    """Run ``count`` ranks until they end, and forward SIGTERM to them.

    Raises the error that a rank reported (see `KINDS`), and `Transient` if one died.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe, error = Path(folder) / "recipe.json", Path(folder) / "error"
        values = {"train": dataclasses.asdict(settings), **limits.plain()}
        recipe.write_text(json.dumps(values), encoding="utf-8")
        command = [
            *(sys.executable, "-P", "-m", "torch.distributed.run", *on_this_machine(Path(folder))),
            *("--nproc-per-node", str(count), "-m", "nudge.components.train"),
            *("--recipe", recipe.as_uri()),
            *(word for name, path in paths.items() for word in (f"--{name}", str(path))),
        ]
        variables = {
            ERROR_VARIABLE: str(error),
            "OMP_NUM_THREADS": str(threads_each(count, settings)),
            "PYTHONSAFEPATH": "1",  # torchrun does not pass -P to the ranks
            STORE_VARIABLE: str(Path(folder) / "ranks"),
            # The agent would offer a store to the ranks on all interfaces, without a password
            # (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **_on_loopback(os.environ),
        }
        ranks = subprocess.Popen(command, env=child_environment(RANK_CHILD, variables))

        def forward(number: int, _: FrameType | None) -> None:
            ranks.send_signal(number)

        previous = signal.signal(signal.SIGTERM, forward)
        try:
            status = ranks.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)
            if ranks.poll() is None:
                ranks.terminate()
                ranks.wait()
        if reported := reported_error(error):
            raise reported
        if status:
            raise Transient(
                f"a training rank died: torchrun ended with status {status} and the log says which "
                "one and why; rerun the same command to resume from the newest checkpoint"
            )


def report_error(error: UserError) -> None:
    """Append the message to the file that the parent process reads, if it named one."""
    if path := os.environ.get(ERROR_VARIABLE):
        for suffix, kind in KINDS.items():
            if isinstance(error, kind):
                Path(path).with_suffix(suffix).touch()
        with Path(path).open("a", encoding="utf-8") as file:
            print(error, file=file)


def reported_error(path: Path) -> UserError | None:
    """The error that ranks reported in this file, each of its lines once; None without one."""
    if not path.exists():
        return None
    kinds = (kind for suffix, kind in KINDS.items() if path.with_suffix(suffix).exists())
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(kinds, UserError)("\n".join(dict.fromkeys(lines)))


def on_this_machine(folder: Path) -> list[str]:
    """torchrun's options for one node that meets in files of ``folder`` instead of at a port."""
    return [
        *("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"),
        *("--rdzv-endpoint", str(folder / "rendezvous"), "--rdzv-id", uuid.uuid4().hex),
    ]


def _on_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that keeps gloo's connections on the loopback interface; empty if it is set."""
    if environment.get(GLOO_INTERFACE):
        return {}
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == "127.0.0.1" for each in addresses):
            return {GLOO_INTERFACE: name}
    return {}


def threads_each(count: int, settings: TrainSettings) -> int:
    """CPU threads per rank, with ``count`` ranks on one machine."""
    return max(1, (settings.threads or usable_cores()) // count)
