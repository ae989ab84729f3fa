"""Two ranks under gloo: vocabulary-parallel weights, and the module under fully_shard."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nudge.kernels import (
    FusedLinearCrossEntropy,
    fused_linear_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

SPLIT = 13  # of 29, for uneven slices
REDUCTIONS: tuple[Literal["mean", "sum"], ...] = ("mean", "sum")


def _start(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)


def _inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(29, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(29, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 29, (17,), generator=generator)
    targets[::5] = -100
    return hidden, weight, bias, targets


def _vocabulary(rank: int, meeting: str) -> None:
    _start(rank, meeting)
    hidden, weight, bias, targets = _inputs()
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, 29)
    choices: tuple[dict[str, Any], ...]
    choices = ({}, {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_softcap": 2.0})
    for options in choices:
        for reduction in REDUCTIONS:
            whole = fused_linear_cross_entropy(
                hidden, weight, targets, bias=bias, reduction=reduction, **options
            )
            wanted = torch.autograd.grad(whole, (hidden, weight, bias))
            part = weight[mine].detach().requires_grad_()
            part_bias = bias[mine].detach().requires_grad_()
            loss = vocab_parallel_linear_cross_entropy(
                hidden, part, targets, bias=part_bias, first_index=mine.start, vocabulary=29,
                reduction=reduction, chunk_rows=5, **options,
            )  # fmt: skip
            made = torch.autograd.grad(loss, (hidden, part, part_bias))
            torch.testing.assert_close(loss, whole)
            torch.testing.assert_close(made[0], wanted[0])
            torch.testing.assert_close(made[1], wanted[1][mine])
            torch.testing.assert_close(made[2], wanted[2][mine])
    dist.destroy_process_group()


def _sharded(rank: int, meeting: str) -> None:
    _start(rank, meeting)
    hidden, weight, _, targets = _inputs()
    head = FusedLinearCrossEntropy(6, 29, dtype=torch.float64, reduction="sum")
    with torch.no_grad():
        head.weight.copy_(weight)
    fully_shard(head, mesh=init_device_mesh("cpu", (2,)))
    rows = slice(0, 8) if rank == 0 else slice(8, 17)
    head(hidden[rows], targets[rows]).backward()
    assert isinstance(head.weight.grad, DTensor)
    made = head.weight.grad.full_tensor()
    with pytest.raises(ValueError, match="weight is a sharded DTensor: use FusedLinear"):
        head.reshard()  # type: ignore[operator]  # `fully_shard` adds it
        fused_linear_cross_entropy(hidden, head.weight, targets)
    whole = fused_linear_cross_entropy(hidden, weight, targets, reduction="sum") / 2
    torch.testing.assert_close(made, torch.autograd.grad(whole, weight)[0])
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_index": 25}, r"first_index 25: with weight \(5, 4\) expected 0 to 24"),
        ({"first_index": -1}, "first_index -1"),
        ({"reduction": "none"}, "reduction 'none'"),
        ({"targets": torch.tensor([0, 29, 3])}, r"targets hold 29: expected 0 to 28 .*\(row 1\)"),
        ({"weight": torch.zeros(5, 3)}, r"hidden \(3, 4\) and weight \(5, 3\)"),
    ],
)
def test_bad_input_is_an_error_before_any_collective_call(
    change: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4),
        "targets": torch.zeros(3, dtype=torch.int64), "first_index": 0, "vocabulary": 29, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        vocab_parallel_linear_cross_entropy(**given)


def _on_two_ranks(case: str, meeting: Path) -> None:
    """Run this file as a script, once per rank, because spawned children cannot import `tests`."""
    command = [sys.executable, __file__, case, str(meeting)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


def test_vocabulary_parallel_equals_one_rank(tmp_path: Path) -> None:
    _on_two_ranks("vocabulary", tmp_path / "meeting")


def test_the_module_trains_under_fully_shard(tmp_path: Path) -> None:
    _on_two_ranks("sharded", tmp_path / "meeting")


if __name__ == "__main__":
    {"vocabulary": _vocabulary, "sharded": _sharded}[sys.argv[1]](int(sys.argv[3]), sys.argv[2])
