"""Compares the fused loss with eager, compiled and torch's own, and with Liger, CCE and quack if
installed.

It measures forward + backward of one head and its loss: seconds, and peak memory beyond inputs and
gradients. Each is compared with every peer and with three measured ``torch.mm`` of the same shapes.
A sweep over N and V is plotted to ``.nudge/bench/kernels.svg``. It uses the GPU if torch sees one.
"""

import argparse
import importlib
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nudge.components.common.core.publish import write_atomic
from nudge.components.common.local.processes import nudge_home
from nudge.kernels import fused_linear_cross_entropy, native
from tests.bench.results import Measure, processor, publish

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OURS, EAGER, COMPILED, TORCH = "ours", "eager", "torch.compile", "F.linear_cross_entropy"
LIGER, CCE, QUACK, PRODUCTS = "Liger", "Cut Cross Entropy", "quack", "3 x torch.mm"
SMALL_BUDGET = "ours, small budget"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """hidden [rows, size], weight [vocabulary, size]."""

    name: str
    rows: int
    size: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16 if CUDA else torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} N={self.rows} D={self.size} V={self.vocabulary} {dtype}"


SMOLLM2 = Shape("SmolLM2-135M", 16384 if CUDA else 2048, 576, 49152)
SHAPES = (
    [
        Shape("Llama-3 8B", 8192, 4096, 128256),
        Shape("Gemma-2 2B", 8192, 2304, 256000),
        SMOLLM2,
    ]
    if CUDA
    else [SMOLLM2]
)
SWEPT = SHAPES[0]
ROWS = [2048, 8192, 32768] if CUDA else [256, 512, 1024]
VOCABULARIES = [32000, 128256, 524288] if CUDA else [8192, 16384, 32768]
ROUNDS = 5
GROUP = 3 if CUDA else 1
"""Runs of a contender per turn. On a GPU the first is not counted: it brings the clock to the level
that this contender's power draw sustains, and lets the host run ahead as in training."""


def small_budget(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunks of an eighth of the rows, and sums in the weight's dtype."""
    return fused_linear_cross_entropy(
        hidden, weight, targets, chunk_rows=len(hidden) // 8, accum_dtype=weight.dtype
    )


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    # As in transformers, the loss of 16-bit logits is computed in float32.
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def torchs_own() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # with options it works in chunks, else eagerly
    return lambda hidden, weight, targets: F.linear_cross_entropy(
        hidden, weight, targets, options=options
    )


def liger() -> Loss:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def cut_cross_entropy() -> Loss:
    found: Loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return found


def quack() -> Loss:
    found = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # 4096 is its authors' choice, but it rejects chunk_size == hidden.shape[1].
        rows = 2048 if hidden.shape[1] == 4096 else 4096
        value: Tensor = found(hidden, weight, targets, chunk_size=rows)
        return value

    return loss


def contenders() -> tuple[dict[str, Loss], dict[str, str]]:
    """The installed contenders by name, and the reasons why others are missing."""
    here: dict[str, Loss] = {OURS: fused_linear_cross_entropy, EAGER: eager}
    here[COMPILED] = torch.compile(
        eager, dynamic=False
    )  # compiled separately for each shape, its best case
    missing = {}
    for name, make, needs_gpu in (
        (TORCH, torchs_own, False), (LIGER, liger, True), (CCE, cut_cross_entropy, True),
        (QUACK, quack, True),
    ):  # fmt: skip
        try:
            if needs_gpu and not CUDA:
                missing[name] = "needs a GPU"
            else:
                here[name] = make()
        except (ImportError, AttributeError, TypeError) as error:
            missing[name] = f"not available: {str(error)[:120]}"
    return here, missing


def draw(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden, weight = (
        torch.randn(count, shape.size, generator=generator, device=DEVICE, dtype=shape.dtype)
        for count in (shape.rows, shape.vocabulary)
    )
    targets = torch.randint(0, shape.vocabulary, (shape.rows,), generator=generator, device=DEVICE)
    return hidden.requires_grad_(), (weight * 0.05).requires_grad_(), targets


def train(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Forward + backward of the loss; the gradients are discarded."""
    value = loss(*inputs)
    value.backward()
    inputs[0].grad = inputs[1].grad = None
    return value.detach()


def products(inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    hidden, weight = (x.detach() for x in inputs[:2])
    logits = hidden.new_empty(len(hidden), len(weight))

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    return run


def timed(run: Callable[[], object]) -> tuple[object, Callable[[], float]]:
    """The result of ``run``, and a function that returns its seconds. On a GPU these are device
    time between events, and the function waits for them."""
    if not CUDA:
        start = time.perf_counter()
        value = run()
        taken = time.perf_counter() - start
        return value, lambda: taken
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    value = run()
    end.record()

    def seconds() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return value, seconds


def times(shape: Shape, losses: Mapping[str, Loss], rounds: int) -> dict[str, float | str]:
    """Median seconds by name, with interleaved rounds; or the error of a contender."""
    inputs = draw(shape)
    runs: dict[str, Callable[[], object]] = {
        name: lambda loss=loss: train(loss, inputs)  # type: ignore[misc]
        for name, loss in losses.items()
    }
    runs[PRODUCTS] = products(inputs)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    wanted = None
    for number in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                group = [timed(run) for _ in range(GROUP)]
            except (RuntimeError, ValueError, AssertionError) as error:
                failed[name] = str(error).splitlines()[0][:120]
                continue
            value = group[-1][0]
            if isinstance(value, Tensor):
                wanted = value.item() if wanted is None else wanted
                if abs(value.item() - wanted) > 0.01 * wanted:
                    failed[name] = f"different loss: {value.item():.4f}, ours {wanted:.4f}"
            if number:
                taken[name] += [seconds() for _, seconds in group[1:] or group]
    return {name: failed.get(name) or statistics.median(taken[name]) for name in runs}


def extra_memory(shape: Shape, name: str) -> float:
    """Peak bytes of one forward + backward beyond inputs and gradients."""
    if CUDA:
        return _extra_memory_here(shape, name)
    # In a separate process: memory that the allocator cached for another contender would hide it.
    command = [sys.executable, "-m", "tests.bench.bench_kernels", "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _extra_memory_here(shape: Shape, name: str) -> float:
    here, _ = contenders()
    loss: Loss = small_budget if name == SMALL_BUDGET else here[name]
    train(loss, draw(replace(shape, rows=256, vocabulary=512)))  # load libraries and start threads
    inputs = draw(shape)
    gradients = sum(x.numel() * x.element_size() for x in inputs[:2])
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(loss, inputs)
        return torch.cuda.max_memory_allocated() - before - gradients
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    train(loss, inputs)
    return _memory("VmHWM") - before - gradients


def _memory(field: str) -> int:
    """Bytes of this process according to the operating system."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def goal(shape: Shape, peer: str) -> float | None:
    if CUDA:
        return {LIGER: 1 / 3, QUACK: 1.0}.get(peer)
    return {EAGER: 0.80, TORCH: 0.40}.get(peer)


def measure(shape: Shape, here: dict[str, Loss], missing: dict[str, str]) -> list[Measure]:
    seconds = times(shape, here, ROUNDS)
    ours = seconds.pop(OURS)
    three = seconds.pop(PRODUCTS)
    measures = []
    mine = ours if isinstance(ours, float) else None
    note = ours if isinstance(ours, str) else ""
    for name, theirs in {**seconds, **missing}.items():
        why = note or (theirs if isinstance(theirs, str) else "")
        measures.append(
            Measure(
                f"{shape}: forward + backward", "s", mine,
                theirs if isinstance(theirs, float) else None, name,
                goal=goal(shape, name), note=why,
            )
        )  # fmt: skip
    share = three / mine if mine and isinstance(three, float) else None
    wanted = (0.8 if shape.size == 576 else 0.9) if CUDA else None
    measures.append(
        Measure(f"{shape}: speed of {PRODUCTS}", "share", share, goal=wanted, better="higher")
    )
    logits = shape.rows * shape.vocabulary * (4 if not CUDA else shape.dtype.itemsize)
    for name in [OURS, SMALL_BUDGET, EAGER, *([TORCH] if TORCH in here else [])]:
        extra = extra_memory(shape, name) / 2**20
        limit = {OURS: None if CUDA else 0.10, SMALL_BUDGET: 0.15}.get(name)
        measures.append(
            Measure(
                f"{shape}: peak extra memory of {name}", "MiB", extra, logits / 2**20,
                "the full logits", goal=limit,
            )
        )  # fmt: skip
        if CUDA and name == OURS:
            measures.append(Measure(f"{shape}: peak extra memory", "MiB", extra, goal=GIB / 2**20))
    return measures


MASKED = (0, 50, 70, 90)
"""Percent of the rows without a target: prompts, in a corpus of conversations."""


def _without_gradients(*leaves: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None


def masked(shape: Shape, rounds: int = ROUNDS) -> list[Measure]:
    """The cost of masked rows, and how far the gradients are from those of eager."""
    hidden, weight, targets = draw(shape)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
    taken: dict[int, list[float]] = {percent: [] for percent in MASKED}
    apart: dict[int, float] = {}
    cases = {}
    for percent in MASKED:
        part = targets.clone()
        part[order[: percent * len(targets) // 100].to(DEVICE)] = -100
        cases[percent] = part, len(targets) - percent * len(targets) // 100
    for number in range(rounds + 1):  # the first round warms up
        for percent, (part, valid) in cases.items():

            def run(part: Tensor = part, valid: int = valid) -> Tensor:
                loss = fused_linear_cross_entropy(hidden, weight, part, valid_rows=valid)
                loss.backward()
                return loss

            group = [timed(run) for _ in range(GROUP)]
            if number:
                taken[percent] += [seconds() for _, seconds in group[1:] or group]
            elif percent not in apart:
                _without_gradients(hidden, weight)
                run()
                ours = [g.clone() for g in (hidden.grad, weight.grad) if g is not None]
                _without_gradients(hidden, weight)
                eager(hidden, weight, part).backward()
                theirs = [g for g in (hidden.grad, weight.grad) if g is not None]
                pairs = zip(ours, theirs, strict=True)
                apart[percent] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            hidden.grad = weight.grad = None
    middle = {percent: statistics.median(times) for percent, times in taken.items()}
    tolerance = 1e-4 if shape.dtype == torch.float32 else 2e-2
    return [
        measure
        for percent in MASKED
        for measure in (
            Measure(
                f"{shape}: {percent} % masked rows", "s", middle[percent], middle[0],
                "no masked rows", goal=None if not percent else 1.25 * (1 - percent / 100),
            ),
            Measure(
                f"{shape}: {percent} % masked rows, gradients against {EAGER}", "relative norm",
                apart[percent], goal=tolerance,
            ),
        )
    ]  # fmt: skip


def sweep(here: dict[str, Loss]) -> tuple[list[Measure], str]:
    """Ours and the peers over N and over V; plots their share of the products' speed as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    measures = []
    for panel, field, values in (
        (panels[0], "rows", ROWS), (panels[1], "vocabulary", VOCABULARIES),
    ):  # fmt: skip
        lines: dict[str, list[tuple[int, float]]] = {}
        for value in values:
            change: dict[str, Any] = {field: value}
            shape = replace(SWEPT, name="sweep", **change)
            seconds = times(shape, here, ROUNDS - 3)
            ours = seconds[OURS]
            three = seconds[PRODUCTS]
            for name, taken in seconds.items():
                if isinstance(taken, float) and isinstance(three, float) and name != PRODUCTS:
                    lines.setdefault(name, []).append((value, three / taken * 100))
                if name != OURS:
                    measures.append(
                        Measure(
                            f"{shape}", "s", ours if isinstance(ours, float) else None,
                            taken if isinstance(taken, float) else None, name,
                            note=next((x for x in (ours, taken) if isinstance(x, str)), ""),
                        )
                    )  # fmt: skip
        for name, points in lines.items():
            width = 2.5 if name == OURS else 1.2
            panel.plot(*zip(*points, strict=True), "o-", label=name, markersize=4, linewidth=width)
        panel.set(xscale="log", xlabel="N (rows)" if field == "rows" else "V")
        panel.set_xticks(values, [str(value) for value in values], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    rest = replace(SWEPT, name="")
    panels[0].set_ylabel(f"speed, % of {PRODUCTS}")
    panels[0].set_ylim(bottom=0)
    panels[0].set_title(f"D={rest.size} V={rest.vocabulary} {rest.dtype}", fontsize=10)
    panels[1].set_title(f"N={rest.rows} D={rest.size} {rest.dtype}", fontsize=10)
    panels[1].legend(fontsize=8)
    figure.suptitle(f"Head and loss on {device_name()}", fontsize=11)
    figure.tight_layout()
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    return measures, drawn.getvalue()


def device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else processor()


def main() -> None:
    parser = argparse.ArgumentParser(description="compare the fused loss with its peers")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--masked", action="store_true", help="measure only masked rows")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="with --masked")
    parser.add_argument("--rows", type=int, default=SMOLLM2.rows, help="with --masked")
    given = parser.parse_args()
    if given.memory_of:
        print(_extra_memory_here(SMOLLM2, given.memory_of))
        return
    if given.masked:
        shape = replace(SMOLLM2, rows=given.rows)
        publish("kernels-masked", masked(shape, given.rounds), ["torch"], device_name())
        return
    if CUDA and (why := native.why_not(torch.cuda.current_device())):
        print(f"running without the kernel: {why}")
    torch._dynamo.config.recompile_limit = len(SHAPES) + len(ROWS) + len(VOCABULARIES) + 1
    here, missing = contenders()
    measures = [one for shape in SHAPES for one in measure(shape, here, missing)]
    if not CUDA:
        measures.append(
            Measure("every shape on a GPU", "s", None, note="unmeasured: torch sees no GPU here")
        )
    measures += masked(SMOLLM2)
    swept, drawing = sweep(here if CUDA else {OURS: here[OURS], EAGER: here[EAGER]})
    write_atomic(nudge_home() / "bench" / "kernels.svg", drawing)
    packages = ["torch", "nudge-kernels", "liger-kernel", "cut-cross-entropy", "quack-kernels"]
    publish("kernels", measures + swept, packages, device_name())
    print(nudge_home() / "bench" / "kernels.svg")


if __name__ == "__main__":
    main()
