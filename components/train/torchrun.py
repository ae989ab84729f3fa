"""Several ranks on this machine: the step starts itself again under torchrun.

Each rank is ``python -m nudge.components.train`` (see `nudge.components.train.__main__`), which is
what a cluster's launcher starts on each node too.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.processes import RANK_CHILD, child_environment, usable_cores
from nudge.components.train.settings import TrainSettings

ERROR_VARIABLE = "NUDGE_ERROR_FILE"
"""A file that a rank which ends in a `UserError` puts the text into."""
TRANSIENT = ".transient"
"""The suffix of an empty file beside it, which says that the error is a `Transient`."""


def processes_wanted(settings: TrainSettings) -> int:
    """How many ranks to start here; 0 if this process is the one to train."""
    if "WORLD_SIZE" in os.environ:  # this is a rank already
        return 0
    count = settings.processes
    if count == 0:
        import torch

        count = torch.cuda.device_count()
    return count if count > 1 else 0


def run_ranks(count: int, settings: TrainSettings, paths: dict[str, Path]) -> None:
    """Run ``count`` ranks until they end; SIGTERM is passed on to them.

    Raises `UserError` with the text of the rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe, error = Path(folder) / "recipe.json", Path(folder) / "error"
        recipe.write_text(json.dumps({"train": dataclasses.asdict(settings)}), encoding="utf-8")
        command = [
            *(sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(count), "-m", "nudge.components.train"),
            *("--recipe", recipe.as_uri()),
            *(word for name, path in paths.items() for word in (f"--{name}", str(path))),
        ]
        variables = {
            ERROR_VARIABLE: str(error),
            "OMP_NUM_THREADS": str(threads_each(count, settings)),
        }
        ranks = subprocess.Popen(command, env=child_environment(RANK_CHILD, variables))

        def pass_on(number: int, _: FrameType | None) -> None:
            ranks.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            status = ranks.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
            if ranks.poll() is None:
                ranks.terminate()
                ranks.wait()
        if error.exists():
            kind = Transient if error.with_suffix(TRANSIENT).exists() else UserError
            raise kind(error.read_text(encoding="utf-8"))
        if status:
            raise Transient(
                f"a rank of the training died (torchrun ended with status {status}, the log says "
                "which one and why); run the same again: it goes on from its newest checkpoint"
            )


def threads_each(count: int, settings: TrainSettings) -> int:
    """The CPU threads of each of ``count`` ranks on one machine."""
    return max(1, (settings.threads or usable_cores()) // count)
