"""The CUDA source, run on the CPU and compared with float64 torch."""

from typing import Any

import pytest
import torch

from nudge.pipelines.gpu_check import calls
from nudge.pipelines.gpu_check.calls import compare
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


def draw(seed: int, dtype: torch.dtype) -> Call:
    """A random call, and one of the ways to run it."""
    return Call(**vars(calls.draw(seed, dtype)), **WAYS[seed % len(WAYS)])


@pytest.mark.parametrize("dtype", TYPES)
def test_random_calls_equal_torch(emulator: Emulator, dtype: torch.dtype) -> None:
    drawn = [draw(seed, dtype) for seed in range(60)]
    for call, made in zip(drawn, emulator.softmax_loss(drawn), strict=True):
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
    drawn = [draw(seed, dtype) for dtype in TYPES for seed in range(100, 120)]
    for call, made in zip(drawn, sanitized.softmax_loss(drawn), strict=True):
        compare(call, made)
