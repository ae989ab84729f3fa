"""The kernel on a GPU. If no GPU can run it, the tests are skipped with the reason."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from nudge.kernels import fused_linear_cross_entropy, native
from tests.kernels.emulated import TYPES, Call
from tests.kernels.test_autograd import OPTIONS, choose, eager, gradients, make
from tests.kernels.test_kernel_source import compare, draw

Reduction = Literal["mean", "none"]


def _reason() -> str:
    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} sees none"
    return native.why_not(0) or ""


pytestmark = pytest.mark.skipif(bool(_reason()), reason=_reason())


def on_gpu(call: Call, path: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = call.logits.shape
    memory = torch.full((rows * (vocabulary + call.padding) + call.offset,), torch.nan)
    memory = memory.to(call.logits.dtype).cuda()
    logits = memory[call.offset :].view(rows, -1)[:, :vocabulary]
    logits.copy_(call.logits)
    losses, lse = torch.empty(rows, device="cuda"), torch.empty(rows, device="cuda")
    class_weight, bias = (None if x is None else x.cuda() for x in (call.class_weight, call.bias))
    scales = call.scales.cuda().expand(rows)
    native.softmax_loss(
        logits, call.targets.cuda(), class_weight, bias, scales, call.ignore_index,
        call.label_smoothing, call.z_loss, call.logit_softcap, losses, lse, call.differentiate,
        path,
    )  # fmt: skip
    assert memory[: call.offset].isnan().all()
    assert memory[call.offset :].view(rows, -1)[:, vocabulary:].isnan().all()
    return logits.cpu(), losses.cpu(), lse.cpu()


@pytest.mark.parametrize("seeds", [range(10), range(10, 100)], ids=["few", "many"])
@pytest.mark.parametrize("path", ["auto", "two-pass", "one-pass"])
@pytest.mark.parametrize("dtype", TYPES)
def test_random_calls_equal_torch(dtype: torch.dtype, path: str, seeds: range) -> None:
    for seed in seeds:
        call = draw(seed, dtype)
        compare(call, on_gpu(call, path))


@pytest.mark.parametrize("vocabulary", [49152, 128256, 128257, 256000, 524288])
@pytest.mark.parametrize("dtype", TYPES)
def test_large_vocabularies_and_the_same_bits_twice(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(4, vocabulary, generator=generator) * 4).to(dtype)
    call = Call(logits, torch.tensor([0, vocabulary - 1, -100, 77]), logit_softcap=30.0)
    first = on_gpu(call)
    compare(call, first)
    assert all(a.equal(b) for a, b in zip(first, on_gpu(call), strict=True))


def test_offsets_beyond_32_bits() -> None:
    rows, vocabulary = 4100, 524288  # 4.3 GB
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("less than 6 GiB of GPU memory is free")
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-1].copy_(torch.randn(vocabulary, device="cuda"))
    last = logits[-1:].cpu().clone()
    losses, lse = torch.empty(rows, device="cuda"), torch.empty(rows, device="cuda")
    targets = torch.full((rows,), 5, device="cuda")
    scale = torch.ones(1, device="cuda").expand(rows)
    native.softmax_loss(logits, targets, None, None, scale, -100, 0.0, 0.0, 0.0, losses, lse, True)
    compare(Call(last, torch.tensor([5])), (logits[-1:].cpu(), losses[-1:].cpu(), lse[-1:].cpu()))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_option_is_as_close_to_float64_as_eager(
    options: dict[str, Any], reduction: str, dtype: torch.dtype
) -> None:
    chosen = {**choose(make(70, 64, 1003, dtype), options), "reduction": reduction}
    gpu = {k: _to_gpu(v, dtype) for k, v in chosen.items()}
    truth = {k: _to_gpu(v, torch.float64) for k, v in gpu.items()}
    exact = gradients(eager, truth)
    ours = gradients(fused_linear_cross_entropy, {**gpu, "chunk_rows": 32})
    for mine, theirs, wanted in zip(ours, gradients(eager, gpu), exact, strict=True):
        error, peer = ((x.double() - wanted).norm() for x in (mine, theirs))
        # A single loss may be closer by luck, far below the resolution of its dtype.
        assert error <= peer * 1.1 + max(1e-6, torch.finfo(dtype).eps * 0.1) * wanted.norm()


def _to_gpu(value: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.cuda()
    moved = value.detach().cuda()
    return (moved if dtype is None else moved.to(dtype)).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_opcheck(reduction: Reduction) -> None:
    chosen = {k: _to_gpu(v) for k, v in choose(make(5, 4, 9), OPTIONS[-1]).items()}
    leaves = {key: chosen[key] for key in ("hidden", "weight", "bias")}

    def call(*values: Tensor) -> Tensor:
        named: dict[str, Any] = {**chosen, **dict(zip(leaves, values, strict=True))}
        return fused_linear_cross_entropy(**named, reduction=reduction)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    single = {k: _to_gpu(v, torch.float32) for k, v in chosen.items()}
    shared = (*(single[k] for k in ("hidden", "weight", "bias", "targets", "class_weight")),)
    rest = (-100, 0.1, 1e-3, 5.0, None, None, 2, None, [True, True, True])
    torch.library.opcheck(torch.ops.nudge.linear_cross_entropy.default, (*shared, True, *rest))
    torch.library.opcheck(torch.ops.nudge.linear_cross_entropy_rows.default, (*shared, *rest))


def _train_step(reduction: Reduction) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
    hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 1000, (300,), device="cuda")

    def step() -> Tensor:
        loss = fused_linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, chunk_rows=50
        )
        (loss.sum() * 2).backward()
        return loss

    return step, [hidden, weight], targets


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_synchronization(reduction: Reduction) -> None:
    step, _, _ = _train_step(reduction)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_capture_in_a_cuda_graph(reduction: Reduction) -> None:
    step, leaves, targets = _train_step(reduction)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
            for leaf in leaves:
                leaf.grad = None
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        targets.random_(0, 1000)
        leaves[0].normal_()
    graph.replay()
    replayed = [captured.clone(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]
    for leaf in leaves:
        leaf.grad = None
    plain = [step(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    for mine, wanted in zip(replayed, plain, strict=True):
        assert mine.equal(wanted)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.long
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on PATH or in /usr/local/cuda/bin")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "7", sys.executable, "-m", "pytest", "-q",
         "-p", "no:cacheprovider", __file__, "-k", "few or large_vocabularies or (every and mean)"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
