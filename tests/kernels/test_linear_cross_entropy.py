"""The fused loss compared with torch's loss on the full logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nudge.kernels import fused_linear_cross_entropy

SHAPES = [(5, 7, 11), (1, 3, 2), (70, 123, 123), (33, 16, 257)]


def make(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n * d * v)
    hidden = torch.randn(n, d, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[::3] = -100 if n > 3 else targets[::3]
    return hidden, weight, targets


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_equals_torch_in_loss_and_gradients(
    shape: tuple[int, int, int], reduction: Any, softcap: float
) -> None:
    hidden, weight, targets = make(*shape, torch.float64)
    results = []
    for fused in (True, False):
        if fused:
            loss = fused_linear_cross_entropy(
                hidden, weight, targets, reduction=reduction, logit_softcap=softcap, chunk_rows=16
            )
        else:
            logits = hidden @ weight.T
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            loss = F.cross_entropy(logits, targets, reduction=reduction)
        outer = torch.linspace(0.5, 2.0, loss.numel()).to(loss.dtype).view_as(loss)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight), outer)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_does_not_change_the_gradient_of_hidden() -> None:
    hidden, weight, targets = make(20, 8, 31, torch.float32)
    (both, _) = torch.autograd.grad(
        fused_linear_cross_entropy(hidden, weight, targets), (hidden, weight)
    )
    frozen = weight.detach()
    (alone,) = torch.autograd.grad(fused_linear_cross_entropy(hidden, frozen, targets), (hidden,))
    torch.testing.assert_close(both, alone)


def test_the_chunk_size_does_not_change_the_loss() -> None:
    hidden, weight, targets = make(70, 123, 123, torch.float32)
    whole = fused_linear_cross_entropy(hidden, weight, targets, chunk_rows=1000)
    torch.testing.assert_close(
        fused_linear_cross_entropy(hidden, weight, targets, chunk_rows=7), whole
    )


def test_no_valid_target_is_zero_for_a_sum_and_nan_for_a_mean() -> None:
    hidden, weight, targets = make(6, 4, 9, torch.float32)
    targets[:] = -100
    total = fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    assert total.item() == 0
    assert torch.autograd.grad(total, hidden)[0].abs().max() == 0
    assert fused_linear_cross_entropy(hidden, weight, targets).isnan()


def test_the_loss_under_autocast_is_close_to_float32() -> None:
    hidden, weight, targets = make(40, 64, 99, torch.float32)
    full = fused_linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        low = fused_linear_cross_entropy(hidden, weight, targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(6, dtype=torch.int32)}, "int64"),
        ({"targets": torch.full((6,), 9)}, "targets hold 9: expected 0 to 8"),
        ({"weight": torch.zeros(9, 5)}, "hidden .* and weight"),
        ({"reduction": "median"}, "reduction 'median'"),
        ({"chunk_rows": 0}, "chunk_rows 0"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    hidden, weight, targets = make(6, 4, 9, torch.float32)
    given: dict[str, Any] = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**given)
