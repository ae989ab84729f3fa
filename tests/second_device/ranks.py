"""A process group for tensors on the second device: real collectives between real processes.

NCCL refuses CPU tensors, and Gloo those of a device that it does not know. This group refuses CPU
tensors as NCCL does, and sends the others through Gloo, by copies on the CPU.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nudge.components.train.ranks import Ranks
from tests import second_device

BACKEND = "second"
TIMEOUT = timedelta(minutes=2)


class Group(dist.ProcessGroup):
    """A group whose tensors are all on the second device."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._size = size
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def size(self) -> int:
        return self._size

    @property
    def pg_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[self])

    @property
    def group_name(self) -> str:
        return self.pg_name

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        return self._reduced(tensors, opts, self._gloo.allreduce)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        for tensor in tensors:
            self.allreduce([tensor], opts).wait()
        return _done(tensors)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        copies = [_copy(tensor) for tensor in tensors]
        given = dist.BroadcastOptions()
        if opts is not None:
            given.rootRank, given.rootTensor = opts.rootRank, opts.rootTensor
        self._gloo.broadcast(copies, given).wait()
        return _back(copies, tensors)

    def barrier(self, opts: Any = None) -> Any:
        self._gloo.barrier().wait()
        return _done([])

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        for parts, mine in zip(outputs, inputs, strict=True):
            copies = [_copy(part) for part in parts]
            self._gloo.allgather([copies], [_copy(mine)]).wait()
            _back(copies, parts)
        return _done(outputs)

    def all_gather_single(self, output: Tensor, mine: Tensor, opts: Any = None) -> Any:
        return self.allgather([list(output.chunk(self._size))], [mine])

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, mine)
        return _done(outputs)

    def reduce_scatter_single(self, output: Tensor, mine: Tensor, opts: Any = None) -> Any:
        total = mine.clone()
        self.allreduce([total], opts)
        output.copy_(total.chunk(self._size)[self.rank()].view_as(output))
        return _done([output])

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        for output, mine in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, mine, opts)
        return _done(outputs)

    def _reduced(self, tensors: Sequence[Tensor], opts: Any, reduce: Callable[..., Any]) -> Any:
        copies = [_copy(tensor) for tensor in tensors]
        given, average = dist.AllreduceOptions(), False
        if opts is not None:
            average = opts.reduceOp == dist.ReduceOp.AVG
            if not average:
                given.reduceOp = opts.reduceOp
        reduce(copies, given).wait()
        if average:
            for copy in copies:
                copy.div_(self._size)
        return _back(copies, tensors)

    # The names of older releases of torch.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _copy(tensor: Tensor) -> Tensor:
    assert tensor.device.type == second_device.NAME, f"a collective got a tensor on {tensor.device}"
    return tensor.detach().cpu().contiguous()


def _back(copies: Sequence[Tensor], tensors: Sequence[Tensor]) -> Any:
    for copy, tensor in zip(copies, tensors, strict=True):
        tensor.detach().copy_(copy)
    return _done(tensors)


def _done(result: Any) -> Any:
    from torch._C._distributed_c10d import _create_work_from_future
    from torch.futures import Future

    future: Any = Future()
    future.set_result(result)
    return _create_work_from_future(future)


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join torchrun's ranks as `nudge.components.train.ranks.joined_ranks` does on GPUs."""
    device = second_device.load()
    dist.Backend.register_backend(BACKEND, Group, devices=["cpu", second_device.NAME])
    dist.init_process_group(BACKEND, timeout=TIMEOUT)
    try:
        yield Ranks(
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_world=int(os.environ["LOCAL_WORLD_SIZE"]),
            device=device,
            saving=dist.new_group(backend="gloo", timeout=TIMEOUT),
        )
    finally:
        dist.destroy_process_group()


def install() -> None:
    """Let this process train on the second device."""
    from nudge.components.train import ranks

    ranks.joined_ranks = joined_ranks


if __name__ == "__main__":  # what torchrun starts instead of nudge.components.train
    import sys

    from nudge.components.train.__main__ import main

    install()
    torch.set_num_threads(1)
    sys.exit(main())
