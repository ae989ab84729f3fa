"""The estimated memory is the memory that training takes."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nudge.components.common.models.loading import meta_model
from nudge.components.train.estimate import FAILURES, Estimator, set_layers
from nudge.components.train.settings import TrainSettings
from tests.components.train.conftest import write_tokens

MiB = 2**20
TRAINED: dict[str, Any] = {
    "sequence_length": 256, "batch_sequences": 4, "micro_batch_sequences": 2, "max_steps": 2,
    "epochs": 9.0, "threads": 1, "validation_sequences": 2, "learning_rate": 1e-4,
}  # fmt: skip
SHORT: dict[str, Any] = {
    "precision": "bfloat16", "sequence_length": 32, "batch_sequences": 2, "max_steps": 1,
    "micro_batch_sequences": 1, "validation_sequences": 1,
}  # fmt: skip
"""Few tokens: a CPU without bfloat16 instructions trains on a handful of them per second."""
CONFIGURATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "full": (1, {}),
    "full, one micro-batch": (1, {"batch_sequences": 2}),
    "full, micro-batch of 8": (1, {"micro_batch_sequences": 8, "batch_sequences": 16}),
    "full, long rows": (1, {"sequence_length": 1024, "micro_batch_sequences": 1}),
    "full, recomputed": (1, {"activation_checkpointing": True, "micro_batch_sequences": 8,
                             "batch_sequences": 8}),
    "full, four of eight layers recomputed": (1, {"activation_checkpointing": 4,
                                                  "micro_batch_sequences": 8,
                                                  "batch_sequences": 8}),
    "full, bfloat16": (1, SHORT),
    "lora": (1, {"mode": "lora"}),
    "lora, micro-batch of 8": (1, {"mode": "lora", "micro_batch_sequences": 8,
                                   "batch_sequences": 16}),
    "lora, bfloat16": (1, {"mode": "lora", **SHORT}),
    "lora, int8": (1, {"mode": "lora", "base_dtype": "int8"}),
    "lora, nf4": (1, {"mode": "lora", "base_dtype": "nf4"}),
    "lora, recomputed": (1, {"mode": "lora", "activation_checkpointing": True,
                             "micro_batch_sequences": 8, "batch_sequences": 8}),
    "full, two shards": (2, {}),
    "full, two replicas": (2, {"parallelism": "ddp"}),
    "lora, two shards": (2, {"mode": "lora"}),
    "lora, two shards, bfloat16": (2, {"mode": "lora", **SHORT}),
}  # fmt: skip
QUICK = ("full", "lora, recomputed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 33 M parameters: 530 MB with gradients and AdamW's moments."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        vocab_size=8000, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def measured(names: Sequence[str], model: Path, tokens: Path, folder: Path) -> dict[str, list[int]]:
    """Bytes at the peak of each configuration's training, on each rank."""
    runs = []
    for name in names:
        ranks, values = CONFIGURATIONS[name]
        runs.append([name, ranks, {**TRAINED, "base_model": str(model), **values}])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.components.train.measured_peak", json.dumps(runs)),
            *(str(tokens), str(folder)),
        ],
        capture_output=True, text=True, timeout=1200, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert all(peak > 0 for each in found for peak in each["peaks"]), done.stderr[-3000:]
    return {each["name"]: each["peaks"] for each in found}


@pytest.mark.parametrize(
    "names",
    [
        QUICK,
        pytest.param(tuple(CONFIGURATIONS), marks=[pytest.mark.long, pytest.mark.timeout(1200)]),
    ],
    ids=["quick", "all"],
)
def test_the_estimated_peak_is_the_measured_one(
    names: tuple[str, ...], model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    tokens = write_tokens(tmp_path / "tokens", tiny_model, documents=400)
    config = AutoConfig.from_pretrained(model)
    wrong = []
    for name, peaks in measured(names, model, tokens, tmp_path / "out").items():
        ranks, values = CONFIGURATIONS[name]
        settings = TrainSettings(**{**TRAINED, "base_model": str(model), **values})
        memory = Estimator(config, settings, ranks, "cpu").memory()
        line = f"{name}: estimated {memory.peak / MiB:.0f} MiB, measured " + " and ".join(
            f"{peak / MiB:.0f}" for peak in peaks
        )
        print(f"\n{line} MiB; {memory}")
        if any(abs(memory.peak - peak) > max(0.1 * peak, 150 * MiB) for peak in peaks):
            wrong.append(line)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma3_text", "mixtral", "bloom", "mamba"])
def test_every_kind_of_architecture_can_be_estimated(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    config.get_text_config().num_hidden_layers = 4
    settings = TrainSettings(base_model="x", sequence_length=64, micro_batch_sequences=1)
    one, two = (
        Estimator(config, TrainSettings(**{**vars(settings), "micro_batch_sequences": n}), 1, "cpu")
        .memory() for n in (1, 2)
    )  # fmt: skip
    assert one.weights == one.gradients == one.optimizer // 2
    assert 0 < one.activations < two.activations


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_causal_class_that_can_be_built_can_be_estimated() -> None:
    settings = TrainSettings(base_model="x", sequence_length=32, micro_batch_sequences=1)
    simulated: list[str] = []
    by_formula: list[str] = []
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config = AutoConfig.for_model(kind)
            if (getattr(config.get_text_config(), "num_hidden_layers", 0) or 0) > 2:
                set_layers(config, 2)
            meta_model(config)
        except (*FAILURES, ImportError, OSError):  # its default config does not build
            continue
        estimate = Estimator(config, settings, 1, "cpu")
        memory = estimate.memory()
        assert memory.weights > 0, kind
        assert memory.activations > 0, kind
        (simulated if estimate.simulated else by_formula).append(kind)
    print(f"\n{len(simulated)} simulated; by the formula: {by_formula}")
    assert len(simulated) > 10 * len(by_formula)


def test_the_formula_is_near_the_simulated_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    settings = TrainSettings(base_model="x", sequence_length=128, micro_batch_sequences=4)
    simulated = Estimator(config, settings, 1, "cpu")
    expected = simulated.memory()

    def fails(*_: Any) -> Any:
        raise RuntimeError("no shapes")

    monkeypatch.setattr("nudge.components.train.estimate._SIMULATED", {})
    monkeypatch.setattr(Estimator, "_run", fails)
    rough = Estimator(config, settings, 1, "cpu")
    assert 0.5 < rough.memory().activations / expected.activations < 2
    assert simulated.simulated
    assert not rough.simulated


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_weights_are_counted_once(mode: str) -> None:
    config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=8)
    settings = TrainSettings(base_model="x", mode=mode, sequence_length=8, micro_batch_sequences=1)  # type: ignore[arg-type]
    memory = Estimator(config, settings, 1, "cpu").memory()
    assert memory.weights > 4 * 50e6
    assert memory.activations < 0.1 * memory.weights


def test_fewer_recomputed_layers_take_more_memory() -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=8)
    values: dict[str, Any] = {"base_model": "x", "sequence_length": 64}
    peaks = [
        Estimator(config, TrainSettings(**values, activation_checkpointing=each), 1, "cpu")
        .memory().peak for each in (False, 1, 4, 8, True)
    ]  # fmt: skip
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[1] > peaks[2] > peaks[3] == peaks[4]


def test_sharding_divides_the_state_and_keeps_the_activations() -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    settings = TrainSettings(base_model="x", sequence_length=64)
    one, four = (Estimator(config, settings, ranks, "cpu").memory() for ranks in (1, 4))
    assert four.weights == one.weights // 4
    assert four.optimizer == one.optimizer // 4
    assert four.gathered > one.gathered == 0
