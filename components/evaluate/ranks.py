"""Several processes on this machine that evaluate one model, each with a share of its weights.

The decoder layers are sharded with FSDP2 and gathered one at a time; embeddings, final norm and
head are on every rank. All ranks make the same calls in the same order, and each scores its share
of the batches.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.models.language_model import speed_up_products
from nudge.components.common.models.loading import empty_model
from nudge.components.common.models.weights import WeightFiles

BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}
TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in one collective call before it fails."""
ONE_GPU_SHARE = 0.6
"""The share of a GPU's memory that weights may take on one rank; the rest is for activations."""


@dataclass(frozen=True)
class Ranks:
    """Rank ``rank`` of ``world``, computing on ``device``."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this rank's results count and its progress is shown."""
        return self.rank == 0

    def summed(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]


class NoProgress:
    """The progress of a rank that shows none."""

    def advance(self, amount: float = 1, **fields: Any) -> None:
        """Show nothing."""

    def note(self, **fields: Any) -> None:
        """Show nothing."""


def ranks_wanted(setting: int, folders: list[Path], dtype: torch.dtype) -> int:
    """The number of ranks: the setting's or, for 0, one if the largest model fits on one device.

    Raises `UserError` if there are GPUs and the setting asks for more ranks than that.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting:
        if gpus and setting > gpus:
            raise UserError(
                f"evaluate.processes = {setting}: this machine has {gpus} GPUs, and each rank "
                f"needs one; set it to at most {gpus}"
            )
        return setting
    if gpus < 2:
        return 1
    largest = max(_parameters(folder) for folder in folders) * dtype.itemsize
    memory = torch.cuda.get_device_properties(0).total_memory
    return 1 if largest < ONE_GPU_SHARE * memory else gpus


def _parameters(folder: Path) -> int:
    files = WeightFiles(folder)
    return sum(torch.Size(files.shape(name)).numel() for name in files.names)


@contextlib.contextmanager
def started(count: int, follow: Callable[..., None], *arguments: Any) -> Iterator[Ranks]:
    """Yield this process as rank 0 of ``count``; the others call ``follow(ranks, *arguments)``.

    ``follow`` must make the same collective calls as the block. Raises `Transient` if one of the
    other processes dies.
    """
    if count == 1:
        yield _on_device(0, 1)
        return
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="nudge-evaluate-") as folder:
        meeting = f"file://{folder}/ranks"
        others = [
            context.Process(
                target=_run, args=(rank, count, meeting, follow, arguments), daemon=True
            )
            for rank in range(1, count)
        ]
        for process in others:
            process.start()
        try:
            yield _join(0, count, meeting)
            for process in others:
                process.join()
        except RuntimeError as error:
            multiprocessing.connection.wait([each.sentinel for each in others], timeout=5)
            died = [process for process in others if process.exitcode]
            if not died:
                raise
            raise Transient(
                f"a process of the evaluation died with exit code {died[0].exitcode}; its log says "
                "why (137 and -9 mean that memory ran out)"
            ) from error
        finally:
            for process in others:
                process.terminate()
                process.join()
            if dist.is_initialized():
                dist.destroy_process_group()


def _run(
    rank: int, count: int, meeting: str, follow: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    ranks = _join(rank, count, meeting)
    try:
        follow(ranks, *arguments)
    finally:
        dist.destroy_process_group()


def _join(rank: int, count: int, meeting: str) -> Ranks:
    ranks = _on_device(rank, count)
    dist.init_process_group(
        BACKENDS[ranks.device.type], init_method=meeting, rank=rank, world_size=count,
        timeout=TIMEOUT,
    )  # fmt: skip
    return ranks


def _on_device(rank: int, count: int) -> Ranks:
    if not torch.cuda.is_available():
        return Ranks(rank, count)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return Ranks(rank, count, device)


def load(folder: Path, dtype: torch.dtype, ranks: Ranks) -> Any:
    """The model of a folder in ``dtype``; each rank reads only its own share of the layers.

    Raises `UserError` if the weights are missing, damaged or do not fit the config.
    """
    model, filler = empty_model(folder)
    for parameter in model.parameters():  # buffers, such as rotary frequencies, stay in float32
        parameter.data = parameter.data.to(dtype)
    if ranks.world > 1:
        _shard(model, ranks)
    filler.fill(model, ranks.device)
    speed_up_products(model)
    return model


def _shard(model: Any, ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    for layer in layers:
        # There is no outer FSDP module, so each layer is a root, and a root keeps its weights
        # gathered unless it is asked not to.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
