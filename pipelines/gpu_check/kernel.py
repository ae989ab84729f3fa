"""The checks of the fused loss: its kernel, its options, and what it promises on a GPU."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nudge.components.common.local.child_environment import MODEL_CHILD, child_environment
from nudge.kernels import fused_linear_cross_entropy, native
from nudge.kernels.arguments import Options
from nudge.kernels.softmax_loss import loss_and_gradient
from nudge.pipelines.gpu_check.calls import TYPES, Call, compare, draw
from nudge.pipelines.gpu_check.checks import Check, Here, Skipped

OPTIONS: list[dict[str, Any]] = [
    {}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"logit_softcap": 3.0}, {"class_weight": True},
    {"bias": True},
    {
        "label_smoothing": 0.2, "z_loss": 1e-2, "logit_softcap": 4.0, "class_weight": True,
        "bias": True,
    },
]  # fmt: skip
SEEDS = range(30)
SANITIZER_HOMES = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/usr/local/cuda/compute-sanitizer")
SANITIZER_LIMIT_S = 100.0


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def loads(here: Here) -> dict[str, Any]:
    """The compiled library is here, is current and fits this GPU."""
    here.needs_gpu()
    if why := native.why_not(0):
        raise AssertionError(f"the loss uses slower torch operations instead of its kernel: {why}")
    library = native.find()
    assert library is not None
    return {"library": str(library), **native.stamp(library)}


def computed(call: Call, here: Here, path: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel, or on a CPU the torch operations, make of a call; all on the CPU.

    Raises `AssertionError` if memory around the rows was written.
    """
    rows, vocabulary = call.logits.shape
    size = rows * (vocabulary + call.padding) + call.offset
    memory = torch.full((size,), torch.nan, dtype=call.logits.dtype, device=here.device)
    logits = memory[call.offset :].view(rows, -1)[:, :vocabulary]
    logits.copy_(call.logits)
    losses, lse = (torch.empty(rows, device=here.device) for _ in range(2))
    weight, bias = (
        None if x is None else x.to(here.device) for x in (call.class_weight, call.bias)
    )
    scale, targets = call.scales.to(here.device).expand(rows), call.targets.to(here.device)
    if here.gpu:
        native.softmax_loss(
            logits, targets, weight, bias, scale, call.ignore_index, call.label_smoothing,
            call.z_loss, call.logit_softcap, losses, lse, call.differentiate, path,
        )  # fmt: skip
    else:
        options = Options(call.ignore_index, call.label_smoothing, call.z_loss, call.logit_softcap)
        work = logits if call.differentiate else logits.clone()
        loss_and_gradient(
            work, targets, weight, bias, scale, options, losses, lse, call.differentiate
        )
        if call.differentiate:  # on a CPU, the caller leaves these rows out
            work[targets == call.ignore_index] = 0
    around = torch.cat(
        [memory[: call.offset], memory[call.offset :].view(rows, -1)[:, vocabulary:].flatten()]
    )
    assert bool(around.isnan().all()), "memory outside of the rows was written"
    return logits.cpu(), losses.cpu(), lse.cpu()


def _needs_kernel(here: Here) -> None:
    if here.gpu and (why := native.why_not(0)):
        raise Skipped(f"needs the kernel: {why}")


def random_calls(here: Here, dtype: torch.dtype, seeds: range = SEEDS) -> dict[str, Any]:
    """Random shapes, alignments and options equal float64 torch, on every path of the kernel."""
    _needs_kernel(here)
    paths = ("auto", "two-pass", "one-pass") if here.gpu else ("auto",)
    for path in paths:
        for seed in seeds:
            call = draw(seed, dtype)
            try:
                compare(call, computed(call, here, path))
            except AssertionError as error:
                raise AssertionError(f"call {seed} on path {path}: {error}") from error
    return {"calls": len(seeds) * len(paths)}


def vocabularies(here: Here) -> dict[str, Any]:
    """Large and odd vocabularies equal float64 torch, and give the same bits twice."""
    _needs_kernel(here)
    sizes = (49152, 128256, 128257, 256000, 524288) if here.gpu else (49152, 128257)
    for size in sizes:
        for dtype in TYPES:
            generator = torch.Generator().manual_seed(size)
            logits = (torch.randn(4, size, generator=generator) * 4).to(dtype)
            call = Call(logits, torch.tensor([0, size - 1, -100, 77]), logit_softcap=30.0)
            first = computed(call, here)
            compare(call, first)
            again = computed(call, here)
            same = all(a.equal(b) for a, b in zip(first, again, strict=True))
            assert same, f"vocabulary {size}, {_dtype(dtype)}: the second call gave other bits"
    return {"vocabularies": ", ".join(map(str, sizes))}


def far_offsets(here: Here) -> dict[str, Any]:
    """Rows beyond 2^31 elements are computed correctly."""
    here.needs_gpu()
    _needs_kernel(here)
    rows, vocabulary = 4100, 524288  # 4.3 GB
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        raise Skipped("needs 6 GiB of free GPU memory")
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-1].copy_(torch.randn(vocabulary, device="cuda"))
    last = logits[-1:].cpu().clone()
    losses, lse = torch.empty(rows, device="cuda"), torch.empty(rows, device="cuda")
    targets = torch.full((rows,), 5, device="cuda")
    scale = torch.ones(1, device="cuda").expand(rows)
    native.softmax_loss(logits, targets, None, None, scale, -100, 0.0, 0.0, 0.0, losses, lse, True)
    compare(Call(last, torch.tensor([5])), (logits[-1:].cpu(), losses[-1:].cpu(), lse[-1:].cpu()))
    return {"elements": f"{rows * vocabulary:,}"}


def eager(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
    reduction: str = "mean", label_smoothing: float = 0.0, z_loss: float = 0.0,
    logit_softcap: float = 0.0, class_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss from all of its logits, by torch's own functions."""
    logits = F.linear(hidden, weight, bias)
    if logit_softcap:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    losses = F.cross_entropy(
        logits, targets, class_weight, reduction="none", label_smoothing=label_smoothing
    )
    valid = targets != -100
    squares = z_loss * logits.logsumexp(1).square() * valid
    if reduction == "none":
        return losses + squares
    if reduction == "sum":
        return losses.sum() + squares.sum()
    weights = logits.new_ones(len(weight)) if class_weight is None else class_weight
    total = weights[targets.where(valid, 0)].where(valid, 0).sum()
    return losses.sum() / total + squares.sum() / valid.sum()


def _inputs(
    n: int, d: int, v: int, dtype: torch.dtype, device: str, options: dict[str, Any]
) -> dict[str, Any]:
    """hidden [n, d], weight [v, d], targets, and what the options name; a third is ignored."""
    generator = torch.Generator().manual_seed(n + d + v)
    drawn: dict[str, Tensor] = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in (("hidden", (n, d)), ("weight", (v, d)), ("bias", (v,)))
    }
    drawn["class_weight"] = torch.rand(v, generator=generator, dtype=torch.float64) + 0.5
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[1::3] = -100
    chosen: dict[str, Any] = {"targets": targets.to(device)}
    for name in ("hidden", "weight", *(key for key, value in options.items() if value is True)):
        tensor = drawn[name].to(dtype).to(device)
        chosen[name] = tensor.requires_grad_(name != "class_weight")
    return chosen | {key: value for key, value in options.items() if value is not True}


def _gradients(function: Callable[..., Any], chosen: dict[str, Any]) -> list[Tensor]:
    loss = function(**chosen)
    outer = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device)
    leaves = [chosen[key] for key in ("hidden", "weight", "bias") if key in chosen]
    return [loss, *torch.autograd.grad(loss, leaves, outer.view_as(loss))]


def options(here: Here) -> dict[str, Any]:
    """With every option, loss and gradients are as close to float64 as those of eager torch."""
    # A CPU's half-precision products sum in another order than eager's single one.
    dtypes = TYPES if here.gpu else (torch.float32,)
    worst = 0.0
    for dtype in dtypes:
        for given in OPTIONS:
            for reduction in ("mean", "sum", "none"):
                wanted = {**given, "reduction": reduction}
                mine = _inputs(70, 64, 1003, dtype, here.device, wanted)
                truth = {
                    key: value.detach().double().requires_grad_(value.requires_grad)
                    if isinstance(value, Tensor) and value.is_floating_point()
                    else value
                    for key, value in mine.items()
                }
                exact = _gradients(eager, truth)
                ours = _gradients(fused_linear_cross_entropy, {**mine, "chunk_rows": 32})
                for a, b, c in zip(ours, _gradients(eager, mine), exact, strict=True):
                    error, peer = (float((x.double() - c).norm()) for x in (a, b))
                    norm = float(c.norm())
                    # A single loss may be closer by luck, far below its dtype's resolution.
                    allowed = peer * 1.1 + max(1e-6, torch.finfo(dtype).eps * 0.1) * norm
                    case = f"{_dtype(dtype)}, {reduction}, {' + '.join(given) or 'no option'}"
                    assert error <= allowed, (
                        f"{case}: error {error:.3g}, but eager's is {peer:.3g} (norm {norm:.3g})"
                    )
                    worst = max(worst, error / norm if norm else 0.0)
    return {"largest relative error": worst}


def autograd(here: Here) -> dict[str, Any]:
    """gradcheck and opcheck of torch find nothing."""
    chosen = _inputs(5, 4, 9, torch.float64, here.device, OPTIONS[-1])
    leaves = {key: chosen[key] for key in ("hidden", "weight", "bias")}
    for reduction in ("mean", "none"):

        def call(*values: Tensor, reduction: str = reduction) -> Tensor:
            named = dict(zip(leaves, values, strict=True))
            loss: Any = fused_linear_cross_entropy
            value: Tensor = loss(**{**chosen, **named}, reduction=reduction)
            return value

        assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    single = {
        key: value.detach().float().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in chosen.items()
    }
    shared = (*(single[key] for key in ("hidden", "weight", "bias", "targets", "class_weight")),)
    rest = (-100, 0.1, 1e-3, 5.0, None, None, 2, None, [True, True, True])
    torch.library.opcheck(torch.ops.nudge.linear_cross_entropy.default, (*shared, True, *rest))
    torch.library.opcheck(torch.ops.nudge.linear_cross_entropy_rows.default, (*shared, *rest))
    return {}


def masked_rows(here: Here) -> dict[str, Any]:
    """With 0, 50, 70, 90 and 100 % of the rows masked, a known count changes no gradient; a wrong
    count does not pass unnoticed."""
    loss: Any = fused_linear_cross_entropy
    for percent in (0, 50, 70, 90, 100):
        drawn = _inputs(200, 32, 301, torch.float32, here.device, {"reduction": "sum"})
        order = torch.randperm(200, generator=torch.Generator().manual_seed(percent))
        drawn["targets"] = torch.arange(200) % 301
        drawn["targets"][order[: 2 * percent]] = -100
        drawn["targets"] = drawn["targets"].to(here.device)
        known = {**drawn, "valid_rows": 200 - 2 * percent}
        wanted = _gradients(eager, drawn)
        for given in (drawn, known):
            for mine, theirs in zip(_gradients(loss, given), wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    try:
        value = loss(**{**known, "valid_rows": 7})
    except ValueError:
        assert not here.gpu
    else:
        assert bool(value.isnan()), "a wrong number of valid rows gave a loss"
    return {}


def no_waiting(here: Here) -> dict[str, Any]:
    """A step of the loss never makes the host wait, and a CUDA graph replays it with equal bits."""
    here.needs_gpu()
    for reduction in ("mean", "none"):
        _graph(reduction)
    return {}


def _graph(reduction: str) -> None:
    hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 1000, (300,), device="cuda")
    loss: Any = fused_linear_cross_entropy

    def step() -> Tensor:
        value: Tensor = loss(hidden, weight, targets, reduction=reduction, chunk_rows=50)
        (value.sum() * 2).backward()
        return value

    def clear() -> None:
        hidden.grad = weight.grad = None

    step()
    clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    clear()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
            clear()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        targets.random_(0, 1000)
        hidden.normal_()
    graph.replay()
    replayed = [captured.clone(), *(x.grad.clone() for x in (hidden, weight) if x.grad is not None)]
    clear()
    plain = [step(), *(x.grad for x in (hidden, weight))]
    for mine, wanted in zip(replayed, plain, strict=True):
        assert wanted is not None
        assert mine.equal(wanted), "the replayed graph gave other bits"


def sanitizer(here: Here, tool: str) -> dict[str, Any]:
    """compute-sanitizer finds nothing while the random calls run."""
    here.needs_gpu()
    _needs_kernel(here)
    found = shutil.which("compute-sanitizer") or next(
        filter(None, (shutil.which("compute-sanitizer", path=home) for home in SANITIZER_HOMES)),
        None,
    )
    if found is None:
        raise Skipped(f"no compute-sanitizer on PATH or in {', '.join(SANITIZER_HOMES)}")
    command = [found, "--tool", tool, "--error-exitcode", "7", sys.executable, "-m", __name__]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SANITIZER_LIMIT_S,
        env=child_environment(MODEL_CHILD),
    )  # fmt: skip
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise AssertionError(f"{tool} ended with status {done.returncode}: {end}")
    return {}


CHECKS = (
    Check("kernel-loads", "The compiled kernel fits this GPU", loads),
    *(
        Check(
            f"kernel-calls-{_dtype(dtype)}",
            f"Random calls in {_dtype(dtype)} equal float64 torch",
            partial(random_calls, dtype=dtype),
        )
        for dtype in TYPES
    ),
    Check("kernel-vocabularies", "Large vocabularies; the same bits twice", vocabularies),
    Check("kernel-offsets", "Offsets beyond 32 bits", far_offsets),
    Check("kernel-options", "Every option is as close to float64 as eager torch", options),
    Check("kernel-autograd", "torch's gradcheck and opcheck", autograd),
    Check("kernel-masked", "Masked rows are skipped with the same gradients", masked_rows),
    Check("kernel-graph", "No synchronization; CUDA graphs", no_waiting),
)
SANITIZERS = tuple(
    Check(
        f"kernel-{tool}",
        f"compute-sanitizer {tool}",
        partial(sanitizer, tool=tool),
        SANITIZER_LIMIT_S + 10,
    )
    for tool in ("memcheck", "racecheck")
)


if __name__ == "__main__":  # what the sanitizers watch
    from pathlib import Path

    for each in TYPES:
        random_calls(Here("cuda", Path()), each, range(4))
