"""What training leaves: the losses of a kept run, a folder others load, figures, and a page."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nudge.components.common.errors import UserError
from nudge.components.common.language_model import load_model
from nudge.components.train.meter import (
    flops_per_token,
    model_flops_utilization,
    peak_flops,
)
from nudge.components.train.model import llama_shape
from nudge.components.train.network import precision_on
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train

from tests.components.train.conftest import lines, outputs, write_tokens
from tests.pages import browser, look

Small = Callable[..., TrainSettings]
GOLDEN = Path(__file__).parent / "golden_losses.json"


def test_the_first_fifty_losses_are_those_kept(small: Small, tokens: Path, tmp_path: Path) -> None:
    """A change that is none of mathematics gives these; write them anew only for one that is."""
    train(small(max_steps=50, epochs=99.0), tokens=tokens, **outputs(tmp_path))
    assert lines(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)


@pytest.mark.parametrize(
    "values", [{"activation_checkpointing": True}, {"micro_batch_sequences": 1}]
)
def test_what_saves_memory_changes_no_loss(
    small: Small, tokens: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    train(small(**values), tokens=tokens, **outputs(tmp_path / "b"))
    assert lines(tmp_path / "b") == pytest.approx(lines(tmp_path / "a"), rel=1e-5)


def test_a_clean_process_loads_it_with_the_same_logits(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    train(small(), tokens=tokens, **outputs(tmp_path))
    folder = tmp_path / "model"
    assert (folder / "generation_config.json").is_file()
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained(sys.argv[1]); print(m(torch.arange(9)[None]).logits.sum().item())"
    )
    made = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    here = load_model(folder)(torch.arange(9)[None]).logits.sum().item()
    assert float(made.stdout) == pytest.approx(here, rel=1e-6)


def test_the_adapter_beside_the_merged_model_is_the_same_model(
    small: Small, tokens: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    train(small(mode="lora", learning_rate=0.05), tokens=tokens, **outputs(tmp_path))
    ids = torch.arange(9)[None]
    merged = load_model(tmp_path / "model")(ids).logits
    adapted = PeftModel.from_pretrained(load_model(tiny_model), tmp_path / "model" / "adapter")
    torch.testing.assert_close(adapted(ids).logits, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load_model(tiny_model)(ids).logits, merged, atol=1e-2)


def test_a_model_from_scratch_of_a_size(small: Small, tokens: Path, tmp_path: Path) -> None:
    settings = small(mode="scratch", model_size="1M", base_model="")
    train(settings, tokens=tokens, **outputs(tmp_path))
    model = load_model(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6, rel=0.3)


@pytest.mark.parametrize("size", ["10M", "124M", "350M", "1B"])
def test_a_size_is_met_within_five_percent(size: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = llama_shape(size, 49152)
    config = AutoConfig.for_model(shape.pop("model_type"), vocab_size=49152, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(wanted, rel=0.05)


def test_mfu_is_of_known_hardware_or_none(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    parameters = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(model, 100)
    assert flops == 6 * parameters + 12 * 2 * 4 * 8 * 100
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("A toaster") is None
    assert model_flops_utilization(1000.0, flops, None, 1) is None
    assert model_flops_utilization(10.0, 5.0, 50.0, 2) == 0.5


def test_tensorboard_has_each_loss(small: Small, tokens: Path, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    train(small(), tokens=tokens, **outputs(tmp_path))
    (path,) = (tmp_path / "history" / "tensorboard").iterdir()
    data, losses = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for value in Event.FromString(data[12 : 12 + length]).summary.value:
            if value.tag == "train/loss":
                losses.append(value.simple_value)
        data = data[16 + length :]
    assert losses == pytest.approx(lines(tmp_path), rel=1e-6)


def test_the_page_is_clean(small: Small, tokens: Path, tmp_path: Path) -> None:
    train(small(), tokens=tokens, **outputs(tmp_path))
    with browser() as opened:
        for width, scheme in ((390, "light"), (1200, "dark")):
            page, faults = look(opened, tmp_path / "report", width, scheme)
            assert faults == []
            assert "12 steps on" in page.locator("body").inner_text()


def test_a_loss_that_diverges_ends_with_its_batch(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    settings = small(learning_rate=1e30, warmup_share=0.0)
    with pytest.raises(UserError, match=r"before step 2: .* rows from row 4 of epoch 0, seed 1"):
        train(settings, tokens=tokens, **outputs(tmp_path))
    assert not any(path.exists() for path in outputs(tmp_path).values())


def test_a_wrong_hash_or_tokenizer_is_refused(
    small: Small, tiny_model: Path, tmp_path: Path
) -> None:
    tokens = write_tokens(tmp_path / "tokens", tiny_model)
    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": 301}))
    with pytest.raises(UserError, match="vocabulary of 301, the model .* has 288: tokenize again"):
        train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    shard = tokens / "train.bin"
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))
    with pytest.raises(UserError, match="train.bin is damaged"):
        train(small(), tokens=tokens, **outputs(tmp_path / "b"))


def test_too_little_memory_says_what_to_lower(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nudge.components.train.network import Network

    def greedy(*_: object) -> torch.Tensor:
        return torch.empty(1 << 46)

    monkeypatch.setattr(Network, "summed_loss", greedy)
    with pytest.raises(UserError, match=r"lower train.micro_batch_sequences \(now 2\)"):
        train(small(), tokens=tokens, **outputs(tmp_path))


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16", "avx2"])
def test_bfloat16_is_taken_where_the_hardware_has_it(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instruction: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    meant = "float32" if instruction == "avx2" else "bfloat16"
    assert precision_on(torch.device("cpu"), "auto") == meant
    assert precision_on(torch.device("cpu"), "bfloat16") == "bfloat16"
    if instruction == "avx2":
        train(small(precision="auto", max_steps=2), tokens=tokens, **outputs(tmp_path))
        made = json.loads((tmp_path / "model" / "nudge.json").read_text())
        assert made["settings"]["precision"] == "float32"
