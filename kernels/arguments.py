"""The arguments and results that the layers of this package exchange."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """hidden [N, D], weight [V, D], bias [V], targets int64 [N], class_weight [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    class_weight: Tensor | None


@dataclass(frozen=True)
class Options:
    """Options of the loss and its computation; see `fused_linear_cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcap: float = 0.0
    accum_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    chunk_rows: int | None = None
    valid_rows: int | None = None


class Wanted(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


class Combine(Protocol):
    """Reductions over ranks that each have a slice of the vocabulary; both work in place."""

    first: int
    """The vocabulary index of this rank's first row."""
    vocabulary: int
    """The size of the vocabulary over all ranks."""

    def max(self, value: Tensor) -> None: ...

    def sum(self, value: Tensor) -> None: ...


class Result(NamedTuple):
    """losses and lse [N]; gradients of sum(row_scale * losses), None if not wanted."""

    losses: Tensor
    lse: Tensor
    row_scale: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
