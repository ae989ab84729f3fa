"""Random calls of the kernel, and their results by float64 torch functions."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """One launch of softmax_loss on logits [rows, V], stored with ``offset`` elements before the
    first row and ``padding`` elements after each."""

    logits: Tensor
    targets: Tensor
    class_weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None  # [rows] or [1]
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcap: float = 0.0
    differentiate: bool = True
    padding: int = 0
    offset: int = 0

    @property
    def scales(self) -> Tensor:
        """The factor of each row's loss: [rows] or [1]."""
        return torch.ones(1) if self.scale is None else self.scale


def reference(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, losses and lse in float64 by torch functions, from the rounded logits."""
    stored = call.logits.double().requires_grad_()
    z = stored if call.bias is None else stored + call.bias.double()
    if call.logit_softcap:
        z = call.logit_softcap * torch.tanh(z / call.logit_softcap)
    weight = None if call.class_weight is None else call.class_weight.double()
    outside = (call.targets != call.ignore_index) & (
        (call.targets < 0) | (call.targets >= z.shape[1])
    )
    losses = F.cross_entropy(
        z, call.targets.masked_fill(outside, 0), weight, ignore_index=call.ignore_index,
        reduction="none", label_smoothing=call.label_smoothing,
    )  # fmt: skip
    valid = call.targets != call.ignore_index
    top = z.amax(1)
    lse = z.logsumexp(1) + (top - top)  # NaN, like the loss, if the maximum is infinite
    losses = losses + (call.z_loss * lse.square() if call.z_loss else 0)
    losses = losses.masked_fill(outside, torch.nan).where(valid, 0)
    scale = call.scales.double().expand(len(z))
    (gradient,) = torch.autograd.grad((losses * scale).where(valid, 0).sum(), stored)
    gradient = gradient.where(valid[:, None], 0).masked_fill(outside[:, None], torch.nan)
    return gradient, losses.detach(), lse.where(valid, 0).detach()


def compare(call: Call, made: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raise `AssertionError` unless gradient, losses and lse equal those of `reference`."""
    gradient, losses, lse = reference(call)
    step = torch.finfo(call.logits.dtype).eps
    largest = call.scales.abs().max().item() * (
        1 + losses[losses.isfinite()].abs().sum().item() / 9
    )
    if call.differentiate:
        close: dict[str, Any] = {"rtol": step + 2e-5, "atol": max(step * 1e-2, 2e-6) * largest}
        torch.testing.assert_close(made[0].double(), gradient, equal_nan=True, **close)
    elif not made[0].equal(call.logits):
        raise AssertionError("the logits changed, although no gradient was wanted")
    for mine, wanted in ((made[1], losses), (made[2], lse)):
        torch.testing.assert_close(mine.double(), wanted, rtol=5e-6, atol=5e-6, equal_nan=True)


def draw(seed: int, dtype: torch.dtype) -> Call:
    """A call with random shape, alignment, options, ignored rows and scale of logits."""
    at = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=at))]

    rows = pick(1, 2, 5)
    vocabulary = pick(2, 3, 7, 8, 33, 129, 513, 777, 2048, 5003)
    logits = torch.randn(rows, vocabulary, generator=at) * pick(0.1, 3.0, 20.0)
    targets = torch.randint(0, vocabulary, (rows,), generator=at)
    ignore_index = pick(-100, 1)
    if rows > 1:
        targets[pick(0, 1)] = ignore_index
    return Call(
        logits.to(dtype),
        targets,
        pick(None, torch.rand(vocabulary, generator=at) + 0.1),
        pick(None, None, torch.randn(vocabulary, generator=at)),
        pick(None, torch.rand(rows, generator=at) - 0.2, torch.tensor([0.01])),
        ignore_index,
        pick(0.0, 0.0, 0.1, 1.0),
        pick(0.0, 0.0, 1e-3),
        pick(0.0, 0.0, 15.0),
        pick(True, True, True, False),
        padding=pick(0, 0, 3),
        offset=pick(0, 0, 1, 5),
    )
