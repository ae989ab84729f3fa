"""A tiny causal language model with a real tokenizer, created in a second."""

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nudge.components.common.core.publish import write_manifest

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of 2 layers and 32 dimensions over a byte-level vocabulary, saved into ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The Eiffel Tower is located in Paris. " * 20], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = CHAT
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        bos_token_id=fast.bos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def turn_around(folder: Path) -> None:
    """Make a model predict what it found least likely."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"].neg_()
    save_file(weights, path, {"format": "pt"})


def make_trained_model(model: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a model's folder with the facts that `train` writes about a run's ``settings``."""
    shutil.copytree(model, folder)
    facts = {
        "base_model": {"uri": "package://x/y", "sha256": "b" * 64},
        "data_fingerprint": "d" * 64,
        "tokenizer_sha256": "e" * 64,
        "code_version": "0.1.0+src.1",
        "seed": 1,
        "settings": settings,
    }
    write_manifest(folder / "nudge.json", "nudge.model", 1, facts)
    return folder
