"""The table of the fused loss: beside eager torch and the three products that any loss needs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nudge.kernels import fused_linear_cross_entropy
from nudge.pipelines.gpu_check.checks import Check, Here

MASKED = (0, 50, 70, 90)
"""Percent of the rows without a target."""


@dataclass(frozen=True)
class Shape:
    """hidden [rows, size], weight [vocabulary, size]."""

    name: str
    rows: int
    size: int
    vocabulary: int
    dtype: str = "bfloat16"


ON_GPU = (
    Shape("Llama-3 8B", 8192, 4096, 128256),
    Shape("Gemma-2 2B", 8192, 2304, 256000),
    Shape("SmolLM2-135M", 16384, 576, 49152),
    Shape("SmolLM2-135M", 4096, 576, 49152, "float32"),
)
ON_CPU = (Shape("SmolLM2-135M", 256, 576, 49152, "float32"),)
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One line of a table; times are seconds of forward + backward, and memory is bytes beyond
    inputs and gradients (None on a CPU, where it is not measured)."""

    name: str
    shape: str
    ours: float
    eager: float
    products: float
    ours_memory: float | None = None
    eager_memory: float | None = None


def _draw(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    hidden, weight = (
        torch.randn(count, shape.size, generator=generator, device=device, dtype=dtype)
        for count in (shape.rows, shape.vocabulary)
    )
    targets = torch.randint(0, shape.vocabulary, (shape.rows,), generator=generator, device=device)
    return hidden.requires_grad_(), (weight * 0.05).detach().requires_grad_(), targets


def _step(loss: Callable[[], Tensor], leaves: tuple[Tensor, Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


def _products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    return run


def _seconds(run: Callable[[], None], gpu: bool) -> float:
    if not gpu:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    # The first run brings the clock to the level that this contender's power draw sustains.
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _medians(runs: dict[str, Callable[[], None]], gpu: bool, rounds: int) -> dict[str, float]:
    """Median seconds by name, over interleaved rounds after one that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = _seconds(run, gpu)
            if number:
                taken[name].append(seconds)
    return {name: statistics.median(times) for name, times in taken.items()}


def _extra_memory(run: Callable[[], None], gradients: int) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before - gradients)


def measured(shape: Shape, gpu: bool, rounds: int = ROUNDS) -> tuple[Row, list[dict[str, float]]]:
    """The row of a shape, and the seconds with each share of `MASKED` rows.

    Raises `AssertionError` if ours and eager differ by more than 1 %.
    """
    hidden, weight, targets = _draw(shape, "cuda" if gpu else "cpu")
    leaves = (hidden, weight)

    def eager() -> Tensor:
        # As in transformers, the loss of 16-bit logits is computed in float32.
        return F.cross_entropy((hidden @ weight.T).float(), targets)

    def ours() -> Tensor:
        return fused_linear_cross_entropy(hidden, weight, targets)

    with torch.no_grad():
        mine, theirs = ours().item(), eager().item()
    assert abs(mine / theirs - 1) < 0.01, f"{shape}: our loss is {mine:.4f}, eager's {theirs:.4f}"
    runs = {
        "ours": _step(ours, leaves),
        "eager": _step(eager, leaves),
        "products": _products(hidden, weight),
    }
    taken = _medians(runs, gpu, rounds)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    memory = {name: _extra_memory(runs[name], gradients) for name in ("ours", "eager") if gpu}
    text = f"N={shape.rows} D={shape.size} V={shape.vocabulary} {shape.dtype}"
    row = Row(
        shape.name, text, taken["ours"], taken["eager"], taken["products"], memory.get("ours"),
        memory.get("eager"),
    )  # fmt: skip
    return row, _masked(hidden, weight, targets, gpu, rounds)


def _masked(
    hidden: Tensor, weight: Tensor, targets: Tensor, gpu: bool, rounds: int
) -> list[dict[str, float]]:
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
    runs = {}
    for percent in MASKED:
        part, count = targets.clone(), percent * len(targets) // 100
        part[order[:count].to(targets.device)] = -100

        def loss(part: Tensor = part, valid: int = len(targets) - count) -> Tensor:
            return fused_linear_cross_entropy(hidden, weight, part, valid_rows=valid)

        runs[str(percent)] = _step(loss, (hidden, weight))
    taken = _medians(runs, gpu, rounds)
    return [{"percent": percent, "seconds": taken[str(percent)]} for percent in MASKED]


def table(here: Here) -> dict[str, Any]:
    """Measure every shape that fits this device."""
    torch.use_deterministic_algorithms(False)  # a training in this process turns them on
    rows: list[dict[str, Any]] = []
    masked: list[dict[str, Any]] = []
    left_out: list[str] = []
    for shape in ON_GPU if here.gpu else ON_CPU:
        try:
            row, shares = measured(shape, here.gpu, ROUNDS if here.gpu else 3)
        except torch.OutOfMemoryError:
            left_out.append(f"{shape.name} {shape.dtype}: not enough GPU memory")
        else:
            rows.append(asdict(row))
            masked.append({"name": f"{shape.name} {shape.dtype}", "shares": shares})
        if here.gpu:
            torch.cuda.empty_cache()
    assert rows, "; ".join(left_out)
    return {"rows": rows, "masked": masked, "left_out": left_out}


CHECKS = (Check("speed-table", "The loss beside eager torch and three products", table, 150.0),)
