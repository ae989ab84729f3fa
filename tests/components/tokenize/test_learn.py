"""A tokenizer trained on the corpus: reproducible, and loadable by transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from nudge.components.common.artifacts.tokens import TokenReader, read_tokens_manifest
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_tree
from nudge.components.common.core.recipe import step_settings
from nudge.components.tokenize.learn import train_tokenizer
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from nudge.pipelines.recipes import check
from tests.components.tokenize.conftest import texts

Run = Callable[..., Path]
CHAT = ("<|im_start|>", "<|im_end|>")
LEARN = {"tokenizer": "train", "base_model": "", "vocab_size": 500, "special_tokens": CHAT}


def test_the_same_corpus_gives_the_same_bytes(run: Run, corpus: Path, tmp_path: Path) -> None:
    first = run("first", **LEARN)
    # Another process, with different string hashes and another number of threads.
    program = (
        "import json, sys; from pathlib import Path\n"
        "from nudge.components.tokenize.settings import TokenizeSettings\n"
        "from nudge.components.tokenize.tokenize import tokenize\n"
        "values, corpus, tokens = json.loads(sys.argv[1])\n"
        "tokenize(TokenizeSettings(**values), corpus=Path(corpus), tokens=Path(tokens))\n"
    )
    arguments = json.dumps([LEARN, str(corpus), str(tmp_path / "second")])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", program, arguments], env=environment, check=True, timeout=200
    )
    assert sha256_tree(tmp_path / "second") == sha256_tree(first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("learnt")
    train_tokenizer(texts(), TokenizeSettings(**LEARN), made)  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_it_has_its_special_tokens_and_little_text_gives_a_smaller_vocabulary(
    tokenizer: Any, tmp_path: Path
) -> None:
    assert len(tokenizer) == 500
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", *CHAT]) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer("a<|im_end|>")["input_ids"][1:] == [2]
    assert tokenizer.decode(tokenizer("b<|im_end|>")["input_ids"], skip_special_tokens=True) == "b"
    few = TokenizeSettings(tokenizer="train", vocab_size=100_000)
    assert 257 < len(train_tokenizer(texts(5), few, tmp_path)) < 2000


def test_it_learns_from_the_sample_only(tmp_path: Path) -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield "some words " * 10_000

    few = TokenizeSettings(tokenizer="train", vocab_size=300, sample_megabytes=1)
    train_tokenizer(endless(), few, tmp_path)  # type: ignore[arg-type]
    assert taken == 10


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text().map(lambda text: text.encode(errors="replace").decode()))
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_model_from_scratch_is_trained_with_it(run: Run, tmp_path: Path) -> None:
    tokens = run(**LEARN)
    shape = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    values = {"max_steps": 4, "sequence_length": 32, "threads": 1, "resume": "never"}
    scratch = TrainSettings(mode="scratch", model_config=shape, **values)  # type: ignore[arg-type]
    model = tmp_path / "model"
    train(scratch, tokens=tokens, model=model, history=tmp_path / "h", report=tmp_path / "r.html")
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert loaded.config.vocab_size == len(tokenizer) == read_tokens_manifest(tokens).vocab_size
    assert loaded.config.eos_token_id == tokenizer.eos_token_id == 0
    text = "petan toris <|im_start|> 123456 Ünïcödé\n\n  end"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    before = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    assert ids["input_ids"][0].tolist() == before(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids["input_ids"][0]) == text
    assert loaded.generate(**ids, max_new_tokens=3).shape[1] == ids["input_ids"].shape[1] + 3
    assert torch.isfinite(loaded(**ids).logits).all()
    assert TokenReader(tokens, "train").document(0)[-1] == 0


def test_a_base_model_cannot_be_trained_with_it(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    tokens = run(**{**LEARN, "vocab_size": 290})
    for_base = TrainSettings(base_model=str(tiny_model), max_steps=1, resume="never")
    outputs = {name: tmp_path / name for name in ("model", "history", "report")}
    with pytest.raises(UserError, match="tokenizer was trained on the corpus.*mode: scratch"):
        train(for_base, tokens=tokens, **outputs)
    recipe = {"base_model": "x", "ingest": {"data_uri": "y"}, "tokenize": {"tokenizer": "train"}}
    with pytest.raises(UserError, match="tokenize.tokenizer: train needs train.mode: scratch"):
        check({**recipe, "train": {"mode": "lora"}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{tokenizer: train, vocab_size: 200}", "vocab_size = 200: .*greater than or equal to 257"),
        (
            "{tokenizer: train, vocab_size: 258, special_tokens: [<a>]}",
            "vocab_size 258 leaves no room besides 256 bytes and 2 special tokens",
        ),
        ("{tokenizer: trained, base_model: x}", "'base_model' or 'train'"),
        ("{}", "tokenizer: base_model needs base_model; tokenizer: train does not"),
        ("{base_model: x, vocabsize: 3}", "did you mean 'vocab_size'"),
        ("{base_model: x, engine: dask}", "'local' or 'ray'"),
    ],
)
def test_wrong_settings_are_reported(values: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        step_settings(TokenizeSettings, "tokenize", f"tokenize: {values}")
