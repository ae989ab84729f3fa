"""Trains a byte-level BPE on the corpus and saves it as a folder for transformers and vLLM."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nudge.components.common.models.end_of_document import END_OF_DOCUMENT
from nudge.components.tokenize.settings import TokenizeSettings

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""No token crosses a boundary of this pattern, that of Llama 3 and of OpenAI's cl100k."""


def train_tokenizer(texts: Iterable[str], settings: TokenizeSettings, folder: Path) -> Any:
    """Train a tokenizer, save it into ``folder`` and return it as transformers loads it.

    The same texts in the same order give the same bytes. Every byte is a token, so any text
    survives a round trip unchanged; ``<|endoftext|>`` ends a document. Byte-level BPE: Sennrich et
    al., arXiv:1508.07909; Radford et al., "Language Models are Unsupervised Multitask Learners".
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=settings.all_special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _all_cores():
        tokenizer.train_from_iterator(_sample(texts, settings.sample_megabytes * 10**6), trainer)
    end = END_OF_DOCUMENT
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
        extra_special_tokens=list(settings.special_tokens),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _sample(texts: Iterable[str], size: int) -> Iterator[str]:
    """The first texts, ``size`` bytes or slightly more."""
    for text in texts:
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
