"""Load a model as a training rank does, and print the peak memory that this took.

``python -m tests.components.train.loading_memory MODEL SETTINGS`` prints one JSON line per rank:
bytes of the rank's own share of the weights, and of the resident memory above what it was before.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nudge.components.train.settings import TrainSettings

SIZES: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10,
    "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000,
}  # fmt: skip


def write_random_model(folder: Path, files: int = 3) -> Path:
    """A Llama of 0.1 billion random bfloat16 weights, with one file in memory at a time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SIZES, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    weight_map: dict[str, str] = {}
    for index in range(files):
        name = f"model-{index + 1:05}-of-{files:05}.safetensors"
        part = list(shapes)[index::files]
        tensors = {each: torch.empty(shapes[each], dtype=torch.bfloat16) for each in part}
        for tensor in tensors.values():
            tensor.normal_(0, 0.02, generator=generator)
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def reset_peak() -> int:
    """Make the peak of this process start at what is resident now; return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The peak resident memory of this process in bytes, since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    from nudge.components.common.models import language_model
    from nudge.components.train import one_rank
    from nudge.components.train.models.model import Start
    from nudge.components.train.ranks import joined_ranks

    settings = TrainSettings(base_model=sys.argv[1], **json.loads(sys.argv[2]))
    torch.set_num_threads(1)
    with joined_ranks() as ranks:
        start = Start(settings, None, 100)
        before = reset_peak()
        loaded: list[int] = []
        fill = Start.fill

        def measured(*arguments: Any) -> None:
            fill(*arguments)
            loaded.append(peak())

        Start.fill = measured  # type: ignore[method-assign,assignment]
        # The model has no tokenizer, from whose start token it would generate.
        language_model.check_generates = lambda *_: None
        network = one_rank._load_network(start, settings, ranks, 100, None)
        share = sum(
            local.numel() * local.element_size()
            for p in network.model.parameters()
            for local in [p.to_local() if hasattr(p, "to_local") else p]
        )
        print(json.dumps({"share": share, "peak": loaded[0] - before}), flush=True)


if __name__ == "__main__":
    main()
