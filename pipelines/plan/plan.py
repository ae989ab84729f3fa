"""What a recipe's training takes: memory per rank, disk, hours and cost, and whether it fits.

Everything comes from the model's config and the recipe; nothing is downloaded or started.
"""

import bisect
import dataclasses
import glob
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nudge.components.common.core.environment import nudge_home, usable_cores
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.hardware import PlanSettings
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.spending.prices import Prices
from nudge.components.ingest.settings import IngestSettings
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.train.settings import TrainSettings
from nudge.pipelines.plan.config import model_config
from nudge.pipelines.plan.speed import measured_speed

BYTES_PER_TOKEN = 4
"""English text has about four bytes per token."""
HOST_BYTES = 2**30
"""What a rank with a GPU takes on the host beside checkpoints: libraries, one part of a file while
it is read, and one tensor while it is written."""
DEFAULT_GPU_BYTES = 80 * 10**9
RECOMPUTE = "train.activation_checkpointing: true"


@dataclass(frozen=True)
class Change:
    """A change of settings that makes the recipe fit, and the peak with it and those before it."""

    setting: str
    costs: str
    device_peak_bytes: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The figures of `nudge plan --json`; None is a figure that is not known."""

    recipe: str
    parameters: int
    trainable_parameters: int
    ranks: int
    nodes: int
    device: str
    device_memory_bytes: int | None
    device_peak_bytes: int
    device_parts: dict[str, int]
    activations_from: str
    """The formula counts where the architecture cannot run on tensors without data."""
    host_memory_bytes: int | None
    host_peak_bytes: int
    """Per node."""
    disk_bytes: int
    disk_parts: dict[str, int]
    tokens: int | None
    tokens_from: str
    steps: int | None
    tokens_per_s: float | None
    tokens_per_s_from: str
    """The setting, or the run that measured it."""
    hours: float | None
    gpu_hours: float | None
    cost: float | None
    currency: str
    fits: bool
    evaluation_bytes: int
    """Weights during evaluation, which loads one model at a time in float32 on one device. ``fits``
    is about training alone."""
    largest_micro_batch: int
    """Sequences per micro-batch; 0 if not even one fits."""
    change: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class _Machine:
    ranks: int
    nodes: int
    device: str
    device_bytes: int | None
    host_bytes: int | None
    cores: float
    """CPU cores of all nodes."""


def plan_recipe(name: str, text: str, config_file: Path | None = None) -> Plan:
    """The plan of a recipe's text; raises `UserError` if its model or its numbers make no sense."""
    train = step_settings(TrainSettings, "train", text)
    tokenize = step_settings(TokenizeSettings, "tokenize", text)
    assumed = step_settings(PlanSettings, "plan", text)
    prices = step_settings(Prices, "prices", text)
    config = model_config(train, tokenize, config_file)
    machine = _machine(train, assumed)
    train = _with_precision(train, machine)
    estimate = _estimator(config, train, machine)
    sizes, memory = estimate.sizes(), estimate.memory()
    disk = _disk(config, train, sizes)
    tokens, source = _tokens(train, assumed, step_settings(IngestSettings, "ingest", text))
    steps, trained = _steps(train, tokens)
    speed, speed_from = assumed.tokens_per_s or None, "plan.tokens_per_s"
    if speed is None:
        measured = measured_speed(nudge_home(), train, machine.ranks, machine.device)
        speed, speed_from = measured or (None, "unknown: set plan.tokens_per_s")
    hours = trained / speed / 3600 if trained is not None and speed else None
    gpus = machine.ranks if machine.device == "cuda" else 0
    host = _host(train, machine, sizes, memory)
    fits = _fits(memory.peak, machine.device_bytes) and _fits(host, machine.host_bytes)
    return Plan(
        recipe=name,
        parameters=sizes.parameters,
        trainable_parameters=sizes.trainable,
        ranks=machine.ranks,
        nodes=machine.nodes,
        device=machine.device,
        device_memory_bytes=machine.device_bytes,
        device_peak_bytes=memory.peak,
        device_parts=dataclasses.asdict(memory),
        activations_from="a simulated step" if estimate.simulated else "a rough formula",
        host_memory_bytes=machine.host_bytes,
        host_peak_bytes=host,
        disk_bytes=sum(disk.values()),
        disk_parts=disk,
        tokens=trained,
        tokens_from=source,
        steps=steps,
        tokens_per_s=speed,
        tokens_per_s_from=speed_from,
        hours=hours,
        gpu_hours=None if hours is None else hours * gpus,
        cost=_cost(hours, gpus, machine, prices),
        currency=prices.currency,
        fits=fits,
        evaluation_bytes=4 * sizes.parameters,
        largest_micro_batch=_largest(estimate, machine),
        change=[] if fits else _changes(config, train, machine),
    )


def _machine(train: TrainSettings, assumed: PlanSettings) -> _Machine:
    cluster = train.cluster
    nodes = cluster.nodes if train.launcher != "local" else 1
    gpus = assumed.gpus
    if gpus is None:
        gpus = nodes * cluster.gpus_per_node if train.launcher != "local" else _gpus_here()
    if gpus % nodes:
        raise UserError(
            f"{gpus} GPUs do not divide over {nodes} nodes: set plan.gpus to a multiple of "
            "train.cluster.nodes"
        )
    cluster_job = train.launcher != "local"
    cores = nodes * _quantity(cluster.cpu) if cluster_job else float(usable_cores())
    host = assumed.host_memory_gb * 1e9
    if not host and train.launcher != "local":
        host = _quantity(cluster.memory)
    if gpus:
        ranks = train.processes or gpus if train.launcher == "local" else gpus
        memory = int(assumed.gpu_memory_gb * 1e9)
        if not memory:
            here = train.launcher == "local" and assumed.gpus is None
            memory = _gpu_memory_here() if here else DEFAULT_GPU_BYTES
        return _Machine(ranks, nodes, "cuda", memory, int(host) or None, cores)
    ranks = (train.processes or 1) if train.launcher == "local" else nodes
    if not host:
        import psutil

        host = psutil.virtual_memory().total
    return _Machine(ranks, nodes, "cpu", int(host) // max(1, ranks // nodes), int(host), cores)


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()


def _gpu_memory_here() -> int:
    """Bytes of this machine's smallest GPU."""
    import torch

    count = torch.cuda.device_count()
    return min(int(torch.cuda.get_device_properties(n).total_memory) for n in range(count))


def _quantity(text: str) -> float:
    """Bytes of a Kubernetes quantity."""
    from kubernetes.utils.quantity import parse_quantity

    return float(parse_quantity(text))


def _with_precision(train: TrainSettings, machine: _Machine) -> TrainSettings:
    """The settings with the precision that ``auto`` selects: bfloat16 on GPUs."""
    if train.precision != "auto":
        return train
    import torch

    from nudge.components.train.models.network import precision_on

    if machine.device == "cuda":
        return dataclasses.replace(train, precision="bfloat16")
    here = precision_on(torch.device("cpu"), "auto")
    return dataclasses.replace(train, precision="bfloat16" if here == "bfloat16" else "float32")


def _estimator(config: Any, train: TrainSettings, machine: _Machine) -> Any:
    from nudge.components.train.estimate import Estimator

    return Estimator(config, train, machine.ranks, machine.device)


def _fits(needed: int, available: int | None) -> bool:
    return available is None or needed <= available


def _host(train: TrainSettings, machine: _Machine, sizes: Any, memory: Any) -> int:
    """Peak host memory of a node: checkpoints are copied to it before they are written."""
    sharded = machine.ranks > 1 and train.parallelism == "fsdp"
    staged = 12 * sizes.trainable // (machine.ranks if sharded else 1)
    each = staged + (memory.peak if machine.device == "cpu" else HOST_BYTES)
    return int(each * max(1, machine.ranks // machine.nodes))


def _disk(config: Any, train: TrainSettings, sizes: Any) -> dict[str, int]:
    """Bytes that a run writes: the base model's copy, checkpoints, and the model."""
    dtype = str(getattr(config, "dtype", None) or "float32")
    stored = 2 if "16" in dtype else 4
    gguf = train.base_model.lower().endswith(".gguf")
    written = {"float32": 4, "bfloat16": 2, "float16": 2}.get(train.export_dtype)
    if written is None:
        written = 2 if gguf else (4 if train.mode == "scratch" else stored)
    base = 0 if train.mode == "scratch" else sizes.parameters * (4 if gguf else stored)
    kept = train.checkpoints_kept + 1 + train.keeps_best  # one more while it is written
    return {
        "base_model": base,
        "checkpoints": kept * 12 * sizes.trainable,
        # The model and its upload.
        "export": 2 * sizes.parameters * written,
    }


def _tokens(
    train: TrainSettings, assumed: PlanSettings, ingest: IngestSettings
) -> tuple[int | None, str]:
    """Training tokens of one epoch, and where the number is from."""
    if assumed.tokens:
        return assumed.tokens, "plan.tokens"
    uris = ingest.data_uri if isinstance(ingest.data_uri, list) else str(ingest.data_uri).split()
    total = 0
    for uri in uris:
        if not is_local(uri):
            return None, f"unknown: {uri} is not on this machine; set plan.tokens"
        try:
            root = str(local_path(uri))
        except UserError:
            return None, f"unknown: {uri} is not on this machine; set plan.tokens"
        for found in map(Path, glob.glob(root, recursive=True)):
            inside = found.rglob("*") if found.is_dir() else [found]
            total += sum(path.stat().st_size for path in inside if path.is_file())
    share = 1 - float(getattr(ingest, "validation_share", 0.0) or 0.0)
    return int(total * share) // BYTES_PER_TOKEN or None, "the size of the text"


def _steps(train: TrainSettings, tokens: int | None) -> tuple[int | None, int | None]:
    """Optimizer steps, and the tokens that they train on."""
    per_step = train.batch_sequences * train.sequence_length
    if tokens is None:
        steps = train.max_steps or None
    else:
        from nudge.components.train.loop import planned_steps

        steps = planned_steps(train, -(-tokens // train.sequence_length))
    if steps is None:
        return None, None
    total = steps * per_step
    return steps, total if tokens is None else min(total, math.ceil(tokens * train.epochs))


def _cost(hours: float | None, gpus: int, machine: _Machine, prices: Prices) -> float | None:
    """What training costs, without energy, which is not known before; None if nothing is known."""
    if hours is None:
        return None
    return prices.cost(
        gpu_hours=hours * gpus, core_hours=hours * machine.cores, node_hours=hours * machine.nodes
    )


def _largest(estimate: Any, machine: _Machine) -> int:
    """The largest micro-batch that fits, at most the sequences of a rank's batch; 0 if none does.

    Memory grows linearly with the rows, except for the chunk of logits, which grows to a limit.
    """
    train, limit = estimate.settings, machine.device_bytes
    most = max(1, -(-train.batch_sequences // machine.ranks))
    low = 1
    first = estimate.memory(low).peak
    if limit is None:
        return int(most)
    if first > limit:
        return 0
    if most == 1:
        return 1
    high, last = most, estimate.memory(most).peak
    if last <= limit:
        return int(most)
    while high - low > 1:
        guess = low + int((limit - first) * (high - low) / max(1, last - first))
        guess = min(max(guess, low + 1), high - 1)
        peak = estimate.memory(guess).peak
        if peak <= limit:
            low, first = guess, peak
        else:
            high, last = guess, peak
    return low


def _changes(config: Any, train: TrainSettings, machine: _Machine) -> list[Change]:
    """Changes to make in this order, each on top of those before it, until the recipe fits.

    They are sorted by what they cost: first those that change nothing that the model learns.
    """
    assert machine.device_bytes is not None
    found: list[Change] = []
    more = dataclasses.replace(machine, ranks=2 * machine.ranks)
    current = train

    def attempt(setting: str, costs: str, changed: TrainSettings, there: _Machine) -> bool:
        memory = _estimator(config, changed, there).memory()
        fits = _fits(memory.peak, there.device_bytes)
        found.append(Change(setting, costs, int(memory.peak), fits))
        return fits

    steps: list[tuple[str, str, Callable[[TrainSettings], TrainSettings]]] = [
        ("train.micro_batch_sequences: 1", "slower steps, same result",
         lambda s: dataclasses.replace(s, micro_batch_sequences=1)),
        ("train.parallelism: fsdp", "more exchange between ranks, same result",
         lambda s: dataclasses.replace(s, parallelism="fsdp")),
        (RECOMPUTE, "up to a third more computation, same result",
         lambda s: dataclasses.replace(s, activation_checkpointing=True)),
        ("train.precision: bfloat16", "rounding",
         lambda s: dataclasses.replace(s, precision="bfloat16")),
        ("train.mode: lora", "trains adapters instead of all weights",
         lambda s: s if s.mode == "scratch" else dataclasses.replace(s, mode="lora")),
        ("train.base_dtype: int8", "the loss that the report shows",
         lambda s: s if s.mode != "lora" else dataclasses.replace(s, base_dtype="int8")),
        ("train.base_dtype: nf4", "the loss that the report shows",
         lambda s: s if s.mode != "lora" else dataclasses.replace(s, base_dtype="nf4")),
    ]  # fmt: skip
    for setting, costs, change in steps:
        changed = change(current)
        if changed == current or (setting.endswith("fsdp") and machine.ranks == 1):
            continue
        if attempt(setting, costs, changed, machine):
            if setting == RECOMPUTE:
                found[-1] = _fewest_recomputed(config, changed, machine) or found[-1]
            return found
        current = changed
    while more.ranks <= 512:
        name = "GPUs" if machine.device == "cuda" else "ranks on as many nodes"
        sharded = dataclasses.replace(current, parallelism="fsdp")
        if attempt(f"{more.ranks} {name}", "more hardware", sharded, more):
            return found
        more = dataclasses.replace(more, ranks=2 * more.ranks)
    return found


def _fewest_recomputed(config: Any, train: TrainSettings, machine: _Machine) -> Change | None:
    """The change that recomputes as few layers as fit; None if all of them are needed."""
    assert machine.device_bytes is not None
    layers = _estimator(config, train, machine).layers
    peaks: dict[int, int] = {}

    def fits(count: int) -> bool:
        changed = dataclasses.replace(train, activation_checkpointing=count)
        peaks[count] = int(_estimator(config, changed, machine).memory().peak)
        return _fits(peaks[count], machine.device_bytes)

    fewest = bisect.bisect_left(range(1, layers), True, key=fits) + 1
    if fewest >= layers or fewest not in peaks:
        return None
    costs = f"recomputes {fewest} of {layers} layers, same result"
    setting = f"train.activation_checkpointing: {fewest}"
    return Change(setting, costs, peaks[fewest], True)
