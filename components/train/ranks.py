"""The processes that train together: which one this is, and the values that they reduce."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nudge.components.common.core.errors import UserError
from nudge.components.train.peers import own_peers
from nudge.components.train.torchrun import STORE_VARIABLE

BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}
TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in one collective call before it fails."""


@dataclass(frozen=True)
class Ranks:
    """Rank ``rank`` of ``world``, computing on ``device``.

    ``saving`` is a separate process group for checkpoints: another thread writes them, and its
    collective calls must not mix with those of the training.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    saving: Any = None

    @property
    def main(self) -> bool:
        """Whether this rank writes the outputs that only one rank writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64; exact for counts."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """A barrier: return once every rank has called this."""
        self.sum(0.0)

    def seed(self, seed: int, step: int) -> None:
        """Seed torch as a pure function of the step, so that dropout needs no saved state."""
        torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + self.rank) % 2**63)


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the process group that torchrun's variables describe; without them, a single rank."""
    cuda = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda and local >= torch.cuda.device_count():
        raise UserError(
            f"rank {local} of this machine has no GPU: there are {torch.cuda.device_count()}, and "
            "each rank needs one; set train.processes or train.cluster.gpus_per_node to that number"
        )
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(device=device)
        return
    initialized = dist.is_initialized()  # by Ray Train, which also destroys the group
    store = os.environ.get(STORE_VARIABLE, "")  # if all ranks are on this machine
    with own_peers() if store else contextlib.nullcontext():
        if not initialized:
            _initialize(BACKENDS[device.type], world, store)
        saving = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield Ranks(
            rank=dist.get_rank(),
            world=world,
            local_rank=local,
            local_world=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            device=device,
            saving=saving,
        )
    finally:
        if not initialized:
            dist.destroy_process_group()


def _initialize(backend: str, world: int, path: str) -> None:
    """Initialize torch's default process group, through the file ``path`` if there is one."""
    if not path:
        dist.init_process_group(backend, timeout=TIMEOUT)
        return
    store = dist.FileStore(path, world)  # type: ignore[attr-defined]
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
