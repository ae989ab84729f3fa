"""The CUDA source, run on the CPU and compared with float64 torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.emulated import SANITIZERS, TYPES, Call, Emulator, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

WAYS: list[dict[str, Any]] = [
    {"keep": False, "threads": 64},
    {"keep": True, "threads": 32},
    {"keep": True, "threads": 64, "blocks": 2},
    {"keep": True, "threads": 32, "blocks": 4},
]
H100 = {
    "major": 9, "processors": 132, "shared_per_block": 232448, "shared_per_processor": 233472,
    "l2": 52428800,
}  # fmt: skip
A100 = {
    "major": 8, "processors": 108, "shared_per_block": 166912, "shared_per_processor": 167936,
    "l2": 41943040,
}  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulator"))


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
    gradient, losses, lse = reference(call)
    step = torch.finfo(call.logits.dtype).eps
    largest = call.scales.abs().max().item() * (
        1 + losses[losses.isfinite()].abs().sum().item() / 9
    )
    if call.differentiate:
        close = {"rtol": step + 2e-5, "atol": max(step * 1e-2, 2e-6) * largest, "equal_nan": True}
        torch.testing.assert_close(made[0].double(), gradient, **close)  # type: ignore[arg-type]
    else:
        assert made[0].equal(call.logits)
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
        **pick(*WAYS),
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_random_calls_equal_torch(emulator: Emulator, dtype: torch.dtype) -> None:
    calls = [draw(seed, dtype) for seed in range(60)]
    for call, made in zip(calls, emulator.softmax_loss(calls), strict=True):
        compare(call, made)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"logit_softcap": 30.0}, {"label_smoothing": 0.1}], ids=str
)
def test_extreme_logits(emulator: Emulator, way: dict[str, Any], options: dict[str, Any]) -> None:
    """+-1e4; -inf at the target, and before and after finite logits; constant rows; infinite and
    NaN rows, which give NaN as in torch."""
    vocabulary = 203
    logits = torch.randn(12, vocabulary, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(12) * 16
    logits[0] = 1e4
    logits[1] = -1e4
    logits[2] = torch.linspace(-1e4, 1e4, vocabulary)
    logits[3, :150] = -torch.inf
    logits[4, 20:] = -torch.inf
    logits[5, targets[5]] = -torch.inf
    logits[6] = -torch.inf
    logits[7] = -torch.inf
    logits[7, targets[7]] = 3.0
    logits[8, 7] = torch.inf
    logits[9, 11] = torch.nan
    logits[10] += 1e4
    logits[11] = 0
    call = Call(logits, targets, **options, **way)
    # With a soft cap or smoothing, torch's result for infinities is not always the limit.
    if options:
        call.logits = logits[[0, 1, 2, 10, 11]]
        call.targets = targets[[0, 1, 2, 10, 11]]
    (made,) = emulator.softmax_loss([call])
    compare(call, made)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_only_rows_with_a_target_out_of_range_are_nan(
    emulator: Emulator, way: dict[str, Any]
) -> None:
    logits = torch.randn(5, 97, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 97, -1, 2**40, 5])
    (made,) = emulator.softmax_loss([Call(logits, targets, **way)])
    compare(Call(logits, targets), made)
    assert made[0].isnan().all(1).tolist() == [False, True, True, True, False]


def test_the_same_call_gives_the_same_bits(emulator: Emulator) -> None:
    for way in WAYS:
        call = draw(7, torch.float32)
        call.logits = torch.randn(2, 5003, generator=torch.Generator().manual_seed(1))
        call.targets, call.class_weight, call.bias = torch.tensor([1, 5002]), None, None
        call = Call(call.logits, call.targets, label_smoothing=0.1, **way)
        results = emulator.softmax_loss([call] * 5)
        for other in results[1:]:
            assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("keep", [True, False])
def test_offsets_beyond_32_bits(emulator: Emulator, keep: bool) -> None:
    """Two rows 2^31 elements apart, in mapped memory that is untouched between the rows."""
    logits = torch.randn(2, 301, generator=torch.Generator().manual_seed(2)).bfloat16()
    call = Call(logits, torch.tensor([300, 0]), keep=keep)
    compare(call, emulator.far_rows(call, 2**31 + 8))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_scale_unless_one(emulator: Emulator, dtype: torch.dtype, offset: int) -> None:
    for count in (1, 5, 8, 1003):
        value = torch.randn(count, generator=torch.Generator().manual_seed(3)).to(dtype)
        made = emulator.scale_unless_one(value, 0.3, offset)
        assert made.equal((value.float() * torch.tensor(0.3)).to(dtype))
        assert emulator.scale_unless_one(value, 1.0, offset).equal(value)


@pytest.mark.parametrize(
    ("device", "vocabulary", "dtype", "blocks"),
    [
        (H100, 128256, torch.bfloat16, 4),
        (H100, 256000, torch.bfloat16, 8),
        (H100, 49152, torch.bfloat16, 1),
        (H100, 524288, torch.bfloat16, 8),
        (H100, 524288, torch.float32, 0),
        (H100, 5, torch.float32, 1),
        (A100, 32000, torch.bfloat16, 1),
        (A100, 128256, torch.bfloat16, 0),
    ],
)
def test_how_rows_are_distributed(
    emulator: Emulator, device: dict[str, int], vocabulary: int, dtype: torch.dtype, blocks: int
) -> None:
    """``blocks`` is the cluster's size, 0 for rows that are read twice; all fit the device."""
    made = emulator.plan(4096, vocabulary, dtype, device)
    assert made["keep"] * made["blocks"] == blocks
    assert made["shared"] <= device["shared_per_block"]
    assert made["threads"] % 32 == 0
    assert 0 < made["threads"] <= 512
    assert made["grid"] % made["blocks"] == 0
    if blocks:
        assert made["shared"] * made["blocks"] >= vocabulary // 8 * 16 * dtype.itemsize // 2
        assert made["grid"] == 4096 * made["blocks"]


@pytest.fixture(scope="module", params=list(SANITIZERS))
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("sanitized"), request.param)


@pytest.mark.long
def test_no_race_and_no_access_out_of_bounds(sanitized: Emulator) -> None:
    """Finds with the C++ compiler's sanitizers what racecheck and memcheck find on a GPU."""
    calls = [draw(seed, dtype) for dtype in TYPES for seed in range(100, 120)]
    for call, made in zip(calls, sanitized.softmax_loss(calls), strict=True):
        compare(call, made)
