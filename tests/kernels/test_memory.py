"""The loss never reads uninitialized memory, or memory between the rows of its inputs.

`poisoned` fills all memory that torch allocates with NaN (integers: their largest value).
`AmxProducts` multiplies as oneDNN does on AMX (its issue 5717, which its pull request 5603 fixed),
so that the fault shows on any CPU.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nudge.kernels import cpu_products, fused_linear_cross_entropy
from nudge.kernels.arguments import Inputs, Options, Wanted
from nudge.kernels.chunked import chunked

SHAPES = [(1, 1, 2), (5, 7, 11), (33, 40, 65), (150, 33, 257), (70, 64, 128)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "gaps", "transposed")
FEATURES = {
    "sse41": "SSE41", "avx2": "AVX2", "avx512_f": "AVX512_CORE", "avx512_bf16": "AVX512_CORE_BF16",
    "amx_bf16": "AVX512_CORE_AMX",
}  # fmt: skip
"""torch's name of a CPU feature, and the level of ONEDNN_MAX_CPU_ISA that requires it."""


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Newly allocated tensors contain NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    deterministic: Any = torch.utils.deterministic  # its type does not list what it reads
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)


def lay_out(value: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, with NaN between rows."""
    if layout == "contiguous":
        return value.contiguous()
    if layout == "transposed":
        return value.T.contiguous().T
    rows, columns = value.shape
    wide = torch.full((rows, columns + 9), torch.nan, dtype=value.dtype)
    wide[:, :columns] = value
    return wide[:, :columns]


def draw(n: int, d: int, v: int, dtype: torch.dtype, layout: str = "contiguous") -> Inputs:
    at = torch.Generator().manual_seed(n * d * v)
    hidden, weight, bias = (
        torch.randn(shape, generator=at, dtype=torch.float64).to(dtype)
        for shape in ((n, d), (v, d), (v,))
    )
    targets = torch.randint(0, v, (n,), generator=at)
    targets[2::5] = -100
    class_weight = torch.rand(v, generator=at) + 0.5
    return Inputs(lay_out(hidden, layout), lay_out(weight, layout), bias, targets, class_weight)


def loss_and_gradients(inputs: Inputs, **options: Any) -> list[Tensor]:
    assert inputs.bias is not None
    leaves = [x.detach().requires_grad_() for x in (inputs.hidden, inputs.weight, inputs.bias)]
    loss = fused_linear_cross_entropy(
        leaves[0], leaves[1], inputs.targets, bias=leaves[2], class_weight=inputs.class_weight,
        label_smoothing=0.1, z_loss=1e-3, logit_softcap=9.0, **options,
    )  # fmt: skip
    outer = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, outer)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("library", ["chosen", "onednn"])
def test_uninitialized_memory_does_not_change_a_bit(
    dtype: torch.dtype, layout: str, library: str, poisoned: None, monkeypatch: Any
) -> None:
    if library == "onednn":
        if not torch.backends.mkldnn.is_available():
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)
    for shape in SHAPES[1:4]:
        inputs = draw(*shape, dtype, layout)
        for reduction in ("mean", "none"):
            for chunk_rows in (None, 16):
                options = {"reduction": reduction, "chunk_rows": chunk_rows}
                made = loss_and_gradients(inputs, **options)
                torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
                wanted = loss_and_gradients(inputs, **options)
                torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
                for mine, theirs in zip(made, wanted, strict=True):
                    assert mine.isfinite().all(), (shape, options)
                    assert mine.equal(theirs), (shape, options)


class AmxProducts(TorchDispatchMode):
    """Makes products of 16-bit matrices read each row up to a multiple of 32 columns if there is a
    gap between rows, as oneDNN does on AMX."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            for factor in (left, right.T):
                made.add_(self._leak(factor)[:, None] if factor is left else self._leak(factor))
        return made

    def _leak(self, factor: Tensor) -> Tensor:
        """The contribution of each row's padding: 0 or NaN."""
        rows, columns = factor.shape
        apart = factor.stride(0)
        read = min(-(-columns // 32) * 32, apart)
        dense = factor.is_contiguous() or factor.stride(1) != 1
        if factor.dtype.itemsize > 2 or dense or read <= columns:
            return factor.new_zeros(rows)
        self.padded += 1
        elements = factor.untyped_storage().nbytes() // factor.itemsize
        if (rows - 1) * apart + read + factor.storage_offset() > elements:
            rows -= 1  # the storage ends before the last row's padding
        offset = factor.storage_offset() + columns
        padding = factor.as_strided((rows, read - columns), (apart, 1), offset)
        leak = factor.new_zeros(factor.shape[0])
        leak[:rows] = (padding * 0).sum(1)
        return leak


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_that_products_read_is_initialized(
    shape: tuple[int, int, int], layout: str, poisoned: None
) -> None:
    inputs = draw(*shape, torch.bfloat16, layout)
    inputs = replace(inputs, targets=inputs.targets.clamp(0))
    with AmxProducts() as products:
        made = chunked(inputs, None, Options(chunk_rows=16), Wanted(True, True, True), mean=True)
    wanted = chunked(inputs, None, Options(chunk_rows=16), Wanted(True, True, True), mean=True)
    for mine, theirs in zip(made, wanted, strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.isfinite().all()
        assert mine.equal(theirs)
    if shape[2] % 32 and shape[2] > 2:
        assert products.padded, "the test saw no padded factor"


@pytest.mark.long
@pytest.mark.parametrize("feature", FEATURES)
def test_every_level_of_onednn_that_this_cpu_has(feature: str) -> None:
    """Rerun the tests above in a process that limits oneDNN to this level."""
    known = torch.cpu.get_capabilities()
    if feature != "sse41" and not known.get(feature):
        pytest.skip(f"this CPU has no {feature}")
    level = FEATURES[feature]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "not level"],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": level}, capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
