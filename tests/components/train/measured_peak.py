"""Train with several settings and print the peak of each training's memory above what the process
uses after its imports.

``python -m tests.components.train.measured_peak RUNS TOKENS OUTPUTS``; ``RUNS`` is a JSON list of
``[name, ranks, settings]``. It prints one JSON line per run, with a value per rank: ``{"name",
"peaks": [bytes], "cpu_seconds": [seconds]}``. Each rank is a fork, so the imports are paid once.
"""

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from nudge.components.common.local.processes import free_port
from tests.components.train.conftest import outputs
from tests.components.train.loading_memory import peak, reset_peak

IMPORTS = (
    "peft", "transformers.models.llama.modeling_llama", "tensorboardX",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "nudge.components.train.one_rank",
)  # fmt: skip


def train_as(rank: int, ranks: int, port: int, settings: Any, tokens: Path, folder: Path) -> int:
    """Train as one rank; returns the peak in bytes."""
    from nudge.components.common.core.settings import parse
    from nudge.components.common.preflight import machine
    from nudge.components.train.limits import NO_LIMITS
    from nudge.components.train.settings import TrainSettings
    from nudge.components.train.train import train_rank

    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    machine.LARGE = 0  # as for a model that takes much of this machine
    before = reset_peak()
    parsed = parse(TrainSettings, settings, "train")
    train_rank(parsed, {"tokens": tokens, **outputs(folder)}, NO_LIMITS)
    return peak() - before


def forked(rank: int, *arguments: Any) -> tuple[int, int]:
    """The process id of a fork that trains, and the end of a pipe to which it writes its peak."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child:
        os.close(sending)
        return child, receiving
    with contextlib.suppress(BaseException):
        try:
            os.write(sending, str(train_as(rank, *arguments)).encode())
        except BaseException:
            traceback.print_exc()
            raise
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    tokens, folder = Path(sys.argv[2]), Path(sys.argv[3])
    for number, (name, ranks, settings) in enumerate(json.loads(sys.argv[1])):
        where, port = folder / str(number), free_port()
        started = [
            forked(rank, ranks, port, settings, tokens, where) for rank in range(ranks)
        ]  # fmt: skip
        peaks, seconds = [], []
        for child, receiving in started:
            with os.fdopen(receiving) as pipe:
                peaks.append(int(pipe.read() or -1))
            used = os.wait4(child, 0)[2]
            seconds.append(round(used.ru_utime + used.ru_stime, 2))
        figures = {"name": name, "peaks": peaks, "cpu_seconds": seconds}
        print("\n" + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
