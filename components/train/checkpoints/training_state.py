"""What a checkpoint restores, and what identifies the run it belongs to."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from nudge.components.train.data import PackedSplit
from nudge.components.train.settings import FREE_TO_CHANGE, TrainSettings


@dataclass
class TrainingState:
    """The progress of training: steps, tokens, seconds, and the best validation.

    The data cursor and the random state are pure functions of ``step``.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    worse_in_a_row: int = 0
    used: dict[str, float] = field(default_factory=dict)
    """What all ranks used until then, earlier attempts included (a plain `Usage`)."""

    def validated(self, loss: float) -> bool:
        """Record this step's validation loss; return whether it is finite and the best so far."""
        if not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            self.worse_in_a_row += 1
            return False
        self.best_step, self.best_loss, self.worse_in_a_row = self.step, loss, 0
        return True


def identity(
    settings: TrainSettings, training: PackedSplit, tokenizer_sha256: str, base_sha256: str,
    steps: int,
) -> dict[str, Any]:  # fmt: skip
    """What identifies a run: the settings that affect learning, and hashes of data and base model.

    Two runs with the same identity end with the same weights.
    """
    values = dataclasses.asdict(settings)
    excluded = FREE_TO_CHANGE | {"base_model"}  # its weights matter, not its location
    if settings.base_dtype == "auto":  # older checkpoints do not have this setting
        excluded = excluded | {"base_dtype"}
    data = training.cursor(0)
    del data["rows_read"]
    identity = {
        "train": {key: value for key, value in values.items() if key not in excluded},
        "data": {**data, "tokenizer_sha256": tokenizer_sha256},
        "base_model_sha256": base_sha256,
        "steps": steps,
    }
    return dict(json.loads(json.dumps(identity)))


def differences(there: dict[str, Any], here: dict[str, Any], path: str = "") -> list[str]:
    """The values that differ between two nested dictionaries, as ``name: 1 there, 2 here``."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        one, other = there.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{path}{key}.")
        elif one != other:
            found.append(f"{path}{key}: {json.dumps(one)} there, {json.dumps(other)} here")
    return found
