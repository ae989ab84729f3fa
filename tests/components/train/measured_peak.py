"""Train in this process and print the peak of its memory above what it uses after its imports.

``python -m tests.components.train.measured_peak SETTINGS TOKENS OUTPUTS`` prints one JSON line per
rank: ``{"peak": bytes}``.
"""

import importlib
import json
import sys
from pathlib import Path

from tests.components.train.conftest import outputs
from tests.components.train.loading_memory import peak, reset_peak

IMPORTS = (
    "peft", "transformers.models.llama.modeling_llama", "tensorboardX",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "nudge.components.train.one_rank",
)  # fmt: skip


def main() -> None:
    from nudge.components.common.core.settings import parse
    from nudge.components.train.settings import TrainSettings
    from nudge.components.train.train import train_rank

    for name in IMPORTS:
        importlib.import_module(name)
    settings = parse(TrainSettings, json.loads(sys.argv[1]), "train")
    before = reset_peak()
    train_rank(settings, tokens=Path(sys.argv[2]), **outputs(Path(sys.argv[3])))
    print("\n" + json.dumps({"peak": peak() - before}), flush=True)


if __name__ == "__main__":
    main()
