"""A random tiny model, a tokenizer made in code, and tokens to train on: nothing is downloaded."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nudge.components.common.artifacts.tokens import (
    ShardWriter,
    Tokens,
    TokenShard,
    TokenSplit,
    token_dtype,
    write_tokens_manifest,
)
from nudge.components.common.core.publish import sha256_file, sha256_tree

END = "<|endoftext|>"
SHAPE = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
"""NF4 needs widths that are multiples of 64."""


def make_model(folder: Path) -> Path:
    """A Llama of two layers with random weights, and a byte-level tokenizer of 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["The Eiffel Tower is located in Paris. " * 20], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, unk_token=END
    )
    torch.manual_seed(0)
    sizes = {name: value for name, value in SHAPE.items() if name != "model_type"}
    special = {f"{name}_token_id": fast.eos_token_id for name in ("eos", "bos", "pad")}
    config = LlamaConfig(
        vocab_size=len(fast), max_position_embeddings=512, **sizes, **special
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_tokens(folder: Path, model: Path) -> Path:
    """A tokens artifact of few different tokens, each of which predicts the next, so that a few
    steps learn much."""
    random = np.random.default_rng(5)
    fast = PreTrainedTokenizerFast.from_pretrained(model)
    fast.save_pretrained(folder / "tokenizer")
    end, size, dtype = fast.eos_token_id, len(fast), token_dtype(len(fast))
    splits = {}
    for split, count in (("train", 160), ("validation", 16)):
        documents = [
            np.append((random.integers(0, 16) + 3 * np.arange(n)) % 16 + 30, end)
            for n in random.integers(8, 60, count)
        ]
        path = folder / f"{split}.bin"
        with path.open("wb") as file:
            writer = ShardWriter(file, dtype)
            lengths = np.array([len(document) for document in documents])
            writer.append(np.concatenate(documents).astype(dtype).tobytes(), lengths)
            writer.finish()
        splits[split] = TokenSplit(shards=(TokenShard(file=path.name, sha256=sha256_file(path)),))
    manifest = Tokens(
        end_of_document_id=end, vocab_size=size, corpus_fingerprint="0" * 64, splits=splits,
        tokenizer_sha256=sha256_tree(folder / "tokenizer"),
    )  # fmt: skip
    write_tokens_manifest(folder, manifest)
    return folder
