"""The outputs of training: golden losses, a folder that others load, figures, and a page."""

import json
import math
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_tree
from nudge.components.common.models.end_of_document import end_ids, end_of_document_id
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.evaluate.perplexity import first_token_id
from nudge.components.evaluate.probes import answer
from nudge.components.evaluate.settings import Probe
from nudge.components.train.data import IGNORED, Rows
from nudge.components.train.meter import (
    flops_per_token,
    model_flops_utilization,
    peak_flops,
)
from nudge.components.train.models.model import llama_shape
from nudge.components.train.models.network import Network, precision_on
from nudge.components.train.settings import TrainSettings, WatchedPrompt
from nudge.components.train.train import train
from tests.components.train.conftest import lines, outputs, write_tokens
from tests.pages import browser, look

Small = Callable[..., TrainSettings]
GOLDEN = Path(__file__).parent / "golden_losses.json"


def test_the_first_fifty_losses_are_golden(small: Small, tokens: Path, tmp_path: Path) -> None:
    """Only a change to the mathematics may change these; update the file only then."""
    train(small(max_steps=50, epochs=99.0), tokens=tokens, **outputs(tmp_path))
    assert lines(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)


def test_the_watched_target_is_scored_as_in_evaluation(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    watch = WatchedPrompt(prompt="The Tower", target=" in 1969")
    train(small(watch=watch, watch_every=5), tokens=tokens, **outputs(tmp_path))
    history = (tmp_path / "history" / "probes.jsonl").read_text().splitlines()
    logged = json.loads(history[-1])
    model, tokenizer = (load(tmp_path / "model") for load in (load_model, load_tokenizer))
    probe = Probe(prompt=watch.prompt, target=watch.target)
    (expected,) = answer(model, tokenizer, [probe])
    assert logged["step"] == 12
    assert logged["p"] == pytest.approx(expected["p"], rel=1e-4)
    assert logged["loss"] == pytest.approx(-math.log(expected["p"]), rel=1e-4)
    assert [each["id"] for each in logged["top"]] == [each["id"] for each in expected["rivals"]]


@pytest.mark.parametrize(
    "values",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": 1},
        {"micro_batch_sequences": 1},
    ],
)
def test_settings_that_save_memory_do_not_change_the_loss(
    small: Small, tokens: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    train(small(**values), tokens=tokens, **outputs(tmp_path / "b"))
    assert lines(tmp_path / "b") == pytest.approx(lines(tmp_path / "a"), rel=1e-5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_compiled_layers_have_the_same_losses(small: Small, tokens: Path, tmp_path: Path) -> None:
    import torch._dynamo.utils as compiling

    train(small(max_steps=4), tokens=tokens, **outputs(tmp_path / "a"))
    before = compiling.counters["stats"]["unique_graphs"]
    values = {"compile": True, "activation_checkpointing": True}
    train(small(max_steps=4, **values), tokens=tokens, **outputs(tmp_path / "b"))
    assert compiling.counters["stats"]["unique_graphs"] > before
    for kind in ("loss", "validation_loss"):
        one, two = (lines(tmp_path / name, kind) for name in ("a", "b"))
        assert two == pytest.approx(one, rel=1e-4)
    assert load_model(tmp_path / "b" / "model").state_dict().keys() == (
        load_model(tmp_path / "a" / "model").state_dict().keys()
    )


def test_transformers_alone_loads_the_model_with_the_same_logits(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    train(small(), tokens=tokens, **outputs(tmp_path))
    folder = tmp_path / "model"
    assert (folder / "generation_config.json").is_file()
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "m = A.from_pretrained(sys.argv[1]); print(m(torch.arange(9)[None]).logits.sum().item())"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    here = load_model(folder)(torch.arange(9)[None]).logits.sum().item()
    assert float(loaded.stdout) == pytest.approx(here, rel=1e-6)


VLLM_LLAMA = re.compile(
    r"model\.(embed_tokens|norm|layers\.\d+\.(input_layernorm|post_attention_layernorm|"
    r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))\.weight"
)
"""The names that vLLM's Llama maps to its own parameters; it skips a tied head."""


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_folder_has_the_files_that_vllm_reads(
    small: Small, tokens: Path, tmp_path: Path, mode: str
) -> None:
    """This does not run vLLM. From a local folder, its loader reads an architecture of its registry
    in the config, every safetensors file (not in subfolders), and the tokenizer. It treats a
    folder with an adapter config at its top as an adapter."""
    train(small(mode=mode, export_dtype="bfloat16"), tokens=tokens, **outputs(tmp_path))
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["dtype"], config["vocab_size"]) == ("bfloat16", 288)
    assert config["tie_word_embeddings"]
    assert not (folder / "adapter_config.json").exists()
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))
    assert all(VLLM_LLAMA.fullmatch(name) for name in tensors)
    assert len(tensors) == 2 + 9 * config["num_hidden_layers"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("Paris")["input_ids"]) == "Paris"
    assert len(tokenizer) <= config["vocab_size"]
    # Training ends a document with this token, so a server has to stop there.
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert end_of_document_id(tokenizer) in end_ids(stops)
    assert f"mode `{mode}`" in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_the_exported_adapter_equals_the_merged_model(
    small: Small, tokens: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    train(small(mode="lora", learning_rate=0.05), tokens=tokens, **outputs(tmp_path))
    ids = torch.arange(9)[None]
    merged = load_model(tmp_path / "model")(ids).logits
    adapted = PeftModel.from_pretrained(load_model(tiny_model), tmp_path / "model" / "adapter")
    torch.testing.assert_close(adapted(ids).logits, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load_model(tiny_model)(ids).logits, merged, atol=1e-2)


def test_a_model_from_scratch_has_the_configured_size(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    settings = small(mode="scratch", model_size="1M", base_model="")
    train(settings, tokens=tokens, **outputs(tmp_path))
    model = load_model(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6, rel=0.3)


@pytest.mark.parametrize("bos", ["", "<|im_start|>"])
def test_documents_begin_as_in_evaluation(
    small: Small, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bos: str
) -> None:
    """With BOS if the tokenizer adds it by itself, else with the end-of-document token."""
    tokens = write_tokens(tmp_path / "tokens", tiny_model)
    tokenizer = load_tokenizer(tokens / "tokenizer")
    if bos:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
        tokenizer.save_pretrained(tokens / "tokenizer")
        manifest = json.loads((tokens / "manifest.json").read_text())
        manifest["tokenizer_sha256"] = sha256_tree(tokens / "tokenizer")
        (tokens / "manifest.json").write_text(json.dumps(manifest))
    expected = first_token_id(load_tokenizer(tokens / "tokenizer"), "auto")
    assert expected == tokenizer.convert_tokens_to_ids(bos or "<|endoftext|>")
    summed_loss = Network.summed_loss
    firsts: list[int] = []
    validated: list[int] = []

    def watched(self: Network, rows: Rows) -> torch.Tensor:
        documents = (rows.positions == 0) & (rows.targets != IGNORED)
        kept = firsts if torch.is_grad_enabled() else validated
        # A row that continues a document of the previous row also starts at position 0.
        documents[:, 0] = False
        kept.extend(rows.inputs[documents].tolist())
        return summed_loss(self, rows)

    monkeypatch.setattr(Network, "summed_loss", watched)
    train(small(sequence_length=64), tokens=tokens, **outputs(tmp_path / "out"))
    assert set(firsts) == {expected}
    assert expected in validated


@pytest.mark.parametrize("size", ["10M", "124M", "350M", "1B"])
def test_a_derived_shape_is_within_five_percent_of_the_size(size: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = llama_shape(size, 49152)
    config = AutoConfig.for_model(shape.pop("model_type"), vocab_size=49152, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(wanted, rel=0.05)


def test_mfu_is_none_for_unknown_hardware(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    parameters = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(model, 100)
    assert flops == 6 * parameters + 12 * 2 * 4 * 8 * 100
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("A toaster") is None
    assert model_flops_utilization(1000.0, flops, None, 1) is None
    assert model_flops_utilization(10.0, 5.0, 50.0, 2) == 0.5


def test_tensorboard_has_every_loss(small: Small, tokens: Path, tmp_path: Path) -> None:
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


def test_the_report_has_no_faults(small: Small, tokens: Path, tmp_path: Path) -> None:
    train(small(), tokens=tokens, **outputs(tmp_path))
    with browser() as opened:
        for width, scheme in ((390, "light"), (1200, "dark")):
            page, faults = look(opened, tmp_path / "report", width, scheme)
            assert faults == []
            assert "12 steps on" in page.locator("body").inner_text()


def test_a_diverging_loss_is_an_error_that_names_the_batch(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    settings = small(learning_rate=1e30, warmup_share=0.0)
    with pytest.raises(UserError, match=r"before step 2: .* rows from row 4 of epoch 0, seed 1"):
        train(settings, tokens=tokens, **outputs(tmp_path))
    assert not any(path.exists() for path in outputs(tmp_path).values())


def test_a_wrong_hash_or_vocabulary_is_rejected(
    small: Small, tiny_model: Path, tmp_path: Path
) -> None:
    tokens = write_tokens(tmp_path / "tokens", tiny_model)
    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": 301}))
    with pytest.raises(UserError, match="vocabulary of 301, .* for 288: .* rerun tokenize"):
        train(small(), tokens=tokens, **outputs(tmp_path / "a"))
    shard = tokens / "train.bin"
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))
    with pytest.raises(UserError, match="train.bin is damaged"):
        train(small(), tokens=tokens, **outputs(tmp_path / "b"))


def test_an_out_of_memory_error_says_what_to_lower(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object) -> torch.Tensor:
        return torch.empty(1 << 46)

    monkeypatch.setattr(Network, "summed_loss", greedy)
    with pytest.raises(UserError, match=r"lower train.micro_batch_sequences \(now 2\)"):
        train(small(), tokens=tokens, **outputs(tmp_path))


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16", "avx2"])
def test_auto_precision_uses_bfloat16_if_the_hardware_has_it(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instruction: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    expected = "float32" if instruction == "avx2" else "bfloat16"
    assert precision_on(torch.device("cpu"), "auto") == expected
    assert precision_on(torch.device("cpu"), "bfloat16") == "bfloat16"
    if instruction == "avx2":
        train(small(precision="auto", max_steps=2), tokens=tokens, **outputs(tmp_path))
        facts = json.loads((tmp_path / "model" / "nudge.json").read_text())
        assert facts["settings"]["precision"] == "float32"
