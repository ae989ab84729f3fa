"""How fast earlier runs of this machine trained with the same model and settings."""

from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.model import read_model_facts
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.registered import split_pin
from nudge.components.train.settings import TrainSettings
from nudge.pipelines.local.history import runs

RUNS = 50
"""How many of the newest runs are read."""
DECIDES = (
    "mode", "model_size", "model_config", "precision", "sequence_length", "micro_batch_sequences",
    "activation_checkpointing", "base_dtype", "compile", "parallelism", "lora_rank",
    "lora_targets",
)  # fmt: skip
"""The settings on which the speed depends."""


def measured_speed(
    home: Path, train: TrainSettings, ranks: int, device: str
) -> tuple[float, str] | None:
    """Tokens per second over all ranks, and the run that reported them; None without such a run.

    ``train`` has the precision that is used. ``device`` is ``cuda`` or ``cpu``.
    """
    for run in runs(home)[:RUNS]:
        model = run.output("train", "model")
        try:
            facts = read_model_facts(model) if model is not None else None
        except UserError:  # written by hand, or damaged
            continue
        if facts is None or facts.training.tokens_per_s is None:
            continue
        there: dict[str, Any] = facts.settings
        same = all(there.get(key) == _plain(getattr(train, key)) for key in DECIDES)
        on_cpu = facts.training.device == "CPU"
        if (
            same
            and facts.base_model.uri == split_pin(train.base_model)[0]
            and facts.training.ranks == ranks
            and on_cpu == (device == "cpu")
        ):
            return facts.training.tokens_per_s, run.run_id
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
