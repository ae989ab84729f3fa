"""Token ids of texts: those of Hugging Face's tokenizers, from the fastest library that agrees.

fastokens reads the same tokenizer.json and is 20 to 80 times as fast. It supports byte-level and
byte-fallback BPE, which language models use, and refuses other kinds. It is used only if both
libraries give the same ids here (`why_not_fast`).
"""

import functools
import itertools
import json
import os
from collections.abc import Iterable

import fastokens
import numpy as np
from tokenizers import Tokenizer

from nudge.components.common.models.control_tokens import ControlTokens

CACHED_WORDS = 1 << 17
"""Words whose tokens a process caches. The library's default of 10,000 is full after a few MB of
text, and it evicts nothing."""
FOLDED = ("\u017f", "\u212a")
"""The long s and the kelvin sign, which a case-insensitive pattern matches as ASCII letters. The
two libraries split the long s differently after an apostrophe. Such texts go to tokenizers."""
SAMPLE_CHARACTERS = 1 << 18
HARD = (
    "", " ", "  a\t b\n\n c\r\n\r\n  d   ", "I'm we'LL they'd it's O'Neil 's 'S", "x" * 999,
    " " * 99, "1 22 333 4444 1234567 3.14 1e-9 ٣٤ ² Ⅷ ½", "a_b __init__(x)=>{y}; // z\n\t\treturn",
    "naïve Ünïcödé ß ǅ", "e\u0301 A\u030a \u1e9b\u0323 ﬁ Å ＡＢ", "北京 東京タワー 안녕하세요",
    "привет мир", "مرحبا بالعالم", "ไทย", "👨‍👩‍👧‍👦🇫🇷❤️",
    "a\u00a0b\u2028c\u200bd\u3000e\u0085f\ufeffg", "▁ ▁a <0x0A> <s> </s> <unk> [UNK]",
    "<|endoftext|> <|im_start|>user<|im_end|> <|eot_id|>",
)  # fmt: skip
"""Where tokenizers differ: spaces, contractions, digits, scripts, marks, special tokens."""


@functools.lru_cache(maxsize=1)
def exact(tokenizer: str) -> Tokenizer:
    """The `tokenizers` object for the text of a tokenizer.json, without truncation and padding."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    made = Tokenizer.from_str(tokenizer)
    made.no_truncation()
    made.no_padding()
    # BPE and Unigram have a cache; natural text is about 10 % faster with a larger one.
    if hasattr(made.model, "_resize_cache"):
        made.model._resize_cache(CACHED_WORDS)
    return made


@functools.lru_cache(maxsize=1)
def _fast(tokenizer: str) -> fastokens.Tokenizer:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    made = fastokens.Tokenizer.from_json_str(tokenizer)
    made.no_truncation()
    made.no_padding()
    return made


def why_not_fast(tokenizer: str, texts: Iterable[str]) -> str | None:
    """None if fastokens accepts this tokenizer and gives the same ids for hard texts and for the
    first quarter of a million characters of ``texts``; else the reason why it is not used."""
    try:
        _fast(tokenizer)
    except ValueError as error:
        return f"{error}"
    seen = 0
    for text in itertools.chain(HARD, texts):
        if not np.array_equal(ids_of([text], tokenizer, True)[0], _exactly(text, tokenizer)):
            return "its ids of a text differ from those of Hugging Face's tokenizers"
        seen += len(text)
        if seen > SAMPLE_CHARACTERS:
            break
    return None


def ids_of(texts: list[str], tokenizer: str, fast: bool) -> list[np.ndarray]:
    """The ids of each text, uint32, without special tokens around them."""
    if not fast:
        return [_exactly(text, tokenizer) for text in texts]
    try:
        found = _quickly(texts, tokenizer)
    except ValueError:  # a byte without a token, which tokenizers skips
        found = [_one(text, tokenizer) for text in texts]
    for number, text in enumerate(texts):
        if any(letter in text for letter in FOLDED):
            found[number] = _exactly(text, tokenizer)
    return found


def text_ids(texts: list[str], tokenizer: str, fast: bool) -> list[np.ndarray]:
    """`ids_of` texts in which a spelled-out control token, such as <|endoftext|>, stays text."""
    found = ids_of(texts, tokenizer, fast)
    control = _control(tokenizer)
    for number, text in enumerate(texts):
        if control.is_in(text):
            found[number] = _as_text(text, tokenizer)
    return found


@functools.lru_cache(maxsize=1)
def _control(tokenizer: str) -> ControlTokens:
    added = json.loads(tokenizer).get("added_tokens") or ()
    return ControlTokens({each["content"]: each["id"] for each in added if each["special"]})


def _as_text(text: str, tokenizer: str) -> np.ndarray:
    made = exact(tokenizer)
    made.encode_special_tokens = True
    try:
        found = _control(tokenizer).as_text(text, lambda piece: _exact_ids(piece, tokenizer))
    finally:
        made.encode_special_tokens = False
    return np.array(found, np.uint32)


def _quickly(texts: list[str], tokenizer: str) -> list[np.ndarray]:
    ids, offsets = _fast(tokenizer).encode_batch_flat(texts, add_special_tokens=False)
    flat, ends = np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").tolist()
    return [flat[first:last] for first, last in itertools.pairwise(ends)]


def _one(text: str, tokenizer: str) -> np.ndarray:
    try:
        return _quickly([text], tokenizer)[0]
    except ValueError:
        return _exactly(text, tokenizer)


def _exactly(text: str, tokenizer: str) -> np.ndarray:
    return np.array(_exact_ids(text, tokenizer), np.uint32)


def _exact_ids(text: str, tokenizer: str) -> list[int]:
    # One text at a time: the tokenizer stores many times an id's size beside each id.
    [found] = exact(tokenizer).encode_batch_fast([text], add_special_tokens=False)
    return list(found.ids)
