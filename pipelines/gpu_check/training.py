"""The checks of training: every mode, resume, export, evaluation, and two ranks."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nudge.components.common.models.end_of_document import document_start_id
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.evaluate.completions import complete
from nudge.components.evaluate.perplexity import score
from nudge.components.evaluate.probes import answer
from nudge.components.evaluate.settings import Probe
from nudge.components.train.data import PackedSplit
from nudge.components.train.limits import NO_LIMITS
from nudge.components.train.one_rank import train_one_rank
from nudge.components.train.ranks import Ranks
from nudge.components.train.record import NoBar
from nudge.components.train.settings import TrainSettings, WatchedPrompt
from nudge.components.train.torchrun import run_ranks
from nudge.components.train.train import train_rank
from nudge.pipelines.gpu_check.checks import Check, Here, Skipped
from nudge.pipelines.gpu_check.tiny import SHAPE, make_model, make_tokens

LENGTH, SEQUENCES = 64, 16
SMALL: dict[str, Any] = {
    "sequence_length": LENGTH, "batch_sequences": 8, "micro_batch_sequences": 4, "max_steps": 12,
    "epochs": 99.0, "learning_rate": 3e-3, "validation_every": 6, "checkpoint_every": 4,
    "validation_sequences": SEQUENCES, "resume": "never",
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"mode": "lora", "learning_rate": 1e-2, "lora_rank": 8},
    "scratch": {"mode": "scratch", "base_model": "", "model_config": SHAPE},
}
CLOSE = {"float32": 1e-3, "bfloat16": 3e-2}
"""The largest relative difference of losses that another order of sums explains."""
LEARNED = 0.9
"""The validation loss after 12 steps, divided by that before, is at most this."""


def _base(here: Here) -> tuple[Path, Path]:
    """The folders of the tiny model and its tokens, made once."""
    model, tokens = here.folder / "base", here.folder / "tokens"
    if not (tokens / "manifest.json").is_file():
        make_tokens(tokens, make_model(model))
    return model, tokens


def _settings(here: Here, mode: str, precision: str, **more: Any) -> TrainSettings:
    model, _ = _base(here)
    values = {**SMALL, "base_model": str(model), "precision": precision, **MODES[mode], **more}
    return TrainSettings(**values)


def _train(here: Here, name: str, settings: TrainSettings, device: str) -> Path:
    """Train in a folder of its own, on the device or on the CPU; returns the folder."""
    folder = here.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    outputs = {each: folder / each for each in ("model", "history", "report")}
    _, tokens = _base(here)
    if device == "cpu":
        train_one_rank(settings, Ranks(), tokens, **outputs, limits=NO_LIMITS)
    else:
        train_rank(settings, {"tokens": tokens, **outputs}, NO_LIMITS)
    return folder


def _figures(folder: Path, name: str) -> list[float]:
    text = (folder / "history" / "metrics.jsonl").read_text(encoding="utf-8")
    return [value[name] for value in map(json.loads, text.splitlines()) if name in value]


def _apart(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other), f"{len(one)} figures, and {len(other)} to compare with"
    return max(abs(a / b - 1) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def _reloaded_loss(here: Here, folder: Path) -> float:
    """The validation loss of an exported model, by transformers alone."""
    from transformers import AutoModelForCausalLM

    _, tokens = _base(here)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", local_files_only=True, trust_remote_code=False, dtype=torch.float32
    ).to(here.device)
    start = document_start_id(load_tokenizer(tokens / "tokenizer"))
    split = PackedSplit(tokens, "validation", LENGTH, seed=1, start=start)
    rows = split.step_batch(0, min(SEQUENCES, split.rows))
    logits = model(
        input_ids=rows.inputs.to(here.device), position_ids=rows.positions.to(here.device),
        use_cache=False,
    ).logits  # fmt: skip
    targets = rows.targets.to(here.device)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


def trains(here: Here, mode: str, precision: str, **more: Any) -> dict[str, Any]:
    """Train, see the loss fall, reload the export with transformers, and compare with a CPU."""
    if more.get("base_dtype") == "nf4":
        import bitsandbytes  # noqa: F401
    native = not here.gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and not native:
        raise Skipped("this GPU has no instructions for bfloat16")
    watch = WatchedPrompt(prompt="The Eiffel Tower is in", target=" Paris")
    settings = _settings(here, mode, precision, watch=watch, **more)
    name = "-".join(("trained", mode, precision, *map(str, more.values())))
    folder = _train(here, name, settings, here.device)
    losses, validation = _figures(folder, "loss"), _figures(folder, "validation_loss")
    fell = validation[-1] / validation[0]
    assert fell <= LEARNED, (
        f"the validation loss went from {validation[0]:.4f} to {validation[-1]:.4f} nats in "
        f"{len(losses)} steps; expected at most {LEARNED} of the first"
    )
    reloaded = _reloaded_loss(here, folder)
    assert abs(reloaded / validation[-1] - 1) <= CLOSE[precision], (
        f"the exported model's validation loss is {reloaded:.5f} nats in transformers, but it was "
        f"{validation[-1]:.5f} in training"
    )
    figures = {
        "validation loss": f"{validation[0]:.3f} to {validation[-1]:.3f}",
        "exported": f"{reloaded:.3f}",
    }
    if here.gpu:
        on_cpu = _figures(_train(here, f"{name}-cpu", settings, "cpu"), "loss")
        apart = _apart(losses, on_cpu)
        assert apart <= CLOSE[precision], (
            f"the losses differ from a CPU's by {apart:.2%}, more than {CLOSE[precision]:.1%}: "
            f"{losses[-1]:.5f} and {on_cpu[-1]:.5f} at the last step"
        )
        figures["losses against a CPU"] = f"{apart:.1e}"
    return figures


def resumes(here: Here, mode: str) -> dict[str, Any]:
    """A run that continues from an early checkpoint ends as the uninterrupted one did."""
    kept = here.folder / f"checkpoints-{mode}"
    shutil.rmtree(kept, ignore_errors=True)
    through = _train(
        here, f"through-{mode}", _settings(here, mode, "float32", checkpoints=str(kept)),
        here.device,
    )  # fmt: skip
    first = min(kept.glob("*/step-*"))
    resumed = _train(
        here, f"resumed-{mode}", _settings(here, mode, "float32", resume=str(first)), here.device
    )
    one, other = (_figures(each, "loss") for each in (through, resumed))
    apart = _apart(one, other)
    # Only a CPU promises equal bits.
    assert apart <= (CLOSE["float32"] if here.gpu else 0.0), (
        f"the losses after resuming from {first.name} differ by {apart:.2e}"
    )
    files = [each / "model" / "model.safetensors" for each in (through, resumed)]
    same = files[0].read_bytes() == files[1].read_bytes()
    assert same or here.gpu, "the resumed run ended with other weights"
    return {"from": first.name, "same bits": "yes" if same else "no"}


def evaluates(here: Here) -> dict[str, Any]:
    """Scores, probes and greedy completions equal those of a CPU."""
    base, _ = _base(here)
    texts = ["The tower of Paris is tall, and so is the next.", "Another text, not so long."]
    made = []
    for device in (here.device, "cpu"):
        model, tokenizer = load_model(base).to(device), load_tokenizer(base)
        bar: Any = NoBar()
        scores = score(model, tokenizer, texts, first_token=None, window=16, stride=8, bar=bar)
        probes = answer(model, tokenizer, [Probe(prompt="The Eiffel", target=" Tower")])
        completions = complete(model, tokenizer, ["The tower of"], 5, twice=True)
        made.append(([each.nats for each in scores], probes[0]["p"], completions))
    (there, p, said), (cpu, cpu_p, cpu_said) = made
    apart = max(_apart(there, cpu), abs(p / cpu_p - 1))
    assert apart <= CLOSE["float32"], f"scores or probabilities differ from a CPU's by {apart:.2%}"
    assert said == cpu_said, f"the completion is {said}, but {cpu_said} on a CPU"
    return {"scores against a CPU": f"{apart:.1e}"}


def two_ranks(here: Here, parallelism: str) -> dict[str, Any]:
    """Two ranks end with the losses of one."""
    if here.gpu and (count := torch.cuda.device_count()) < 2:
        raise Skipped(f"needs two GPUs; this machine has {count}")
    alone = _train(here, "one-rank", _settings(here, "full", "float32"), here.device)
    folder = here.folder / f"two-ranks-{parallelism}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = _settings(here, "full", "float32", processes=2, parallelism=parallelism)
    paths = {each: folder / each for each in ("model", "history", "report")}
    run_ranks(2, settings, {"tokens": _base(here)[1], **paths})
    apart = _apart(_figures(folder, "loss"), _figures(alone, "loss"))
    assert apart <= CLOSE["float32"], f"the losses differ from those of one rank by {apart:.2%}"
    return {"losses against one rank": f"{apart:.1e}"}


def _named(mode: str, precision: str) -> str:
    shown = {"full": "All weights", "lora": "LoRA", "scratch": "From scratch"}[mode]
    return f"{shown} in {precision}: train, export, reload"


CHECKS = (
    *(
        Check(
            f"train-{mode}-{precision}", _named(mode, precision),
            partial(trains, mode=mode, precision=precision),
        )
        for mode in MODES
        for precision in ("float32", "bfloat16")
    ),
    *(
        Check(
            f"train-lora-{kind}", f"LoRA beside an {kind} base: train, export, reload",
            partial(trains, mode="lora", precision="float32", base_dtype=kind),
        )
        for kind in ("int8", "nf4")
    ),
    *(
        Check(f"train-resume-{mode}", f"Resume from a checkpoint: {mode}",
              partial(resumes, mode=mode))
        for mode in ("full", "lora")
    ),
    Check("train-evaluate", "Evaluation: scores, probes, completions", evaluates),
    *(
        Check(f"train-two-ranks-{kind}", f"Two ranks with {kind.upper()}",
              partial(two_ranks, parallelism=kind), 180.0)
        for kind in ("ddp", "fsdp")
    ),
)  # fmt: skip
