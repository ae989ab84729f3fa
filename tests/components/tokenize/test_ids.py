"""The fast library gives the same ids as Hugging Face's tokenizers, or is not used."""

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nudge.components.common.chat.masks import Encoder, Masked, Plain
from nudge.components.common.chat.render import Rendered
from nudge.components.common.core.publish import sha256_tree
from nudge.components.evaluate.perplexity import _text_ids as scored_ids
from nudge.components.evaluate.settings import evaluate_settings
from nudge.components.tokenize import ids
from nudge.components.tokenize.encode import Encoding, encode
from nudge.components.tokenize.ids import ids_of, text_ids, why_not_fast

Run = Callable[..., Path]

TEXTS = [
    *sorted(topics.values())[:40],
    "Ünïcödé naïve café 北京 東京 안녕하세요 привет мир مرحبا " * 20,
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<unk>"]


def bpe(
    before: Any, normalizer: Any = None, alphabet: bool = True, merges: int = 2000, **options: Any
) -> str:
    """The tokenizer.json of a BPE trained on `TEXTS`."""
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer = before
    if normalizer is not None:
        made.normalizer = normalizer
    first = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if options.get("byte_fallback") else []
    trainer = trainers.BpeTrainer(
        vocab_size=merges, special_tokens=SPECIAL + bytes_, initial_alphabet=first,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(TEXTS, trainer)
    return made.to_str()


def split(pattern: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


KINDS: dict[str, Callable[[], str]] = {
    "GPT-2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "GPT-2 with a space before": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "SmolLM2, without every byte": lambda: bpe(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        alphabet=False,
    ),
    "Llama 3": lambda: bpe(split(LLAMA_3), ignore_merges=True),
    "Qwen": lambda: bpe(split(LLAMA_3.replace("{1,3}", "")), normalizers.NFC()),
    "Gemma": lambda: bpe(
        pre_tokenizers.Split(" ", "merged_with_previous"),
        normalizers.Replace(" ", "▁"),
        alphabet=False, byte_fallback=True, unk_token="<unk>", fuse_unk=True,
    ),
}  # fmt: skip

PIECES = [
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "'s", "'LL", "don't", " 123", "12345678", *SPECIAL,
    "3.14", "▁", "\u0085", "\u2028", "\u200b", "\u00a0", " \u3000", "ſ", "'ſр", "\u212a", "İ", "ß",
    "ǅ", "e\u0301", "\u1e9b\u0323", "ﬁ", "Å", "٣٤", "²", "Ⅷ", "👨‍👩‍👧‍👦", "🇫🇷",
    "a" * 50, " " * 40, "=====", "<0x0A>", "__init__", "\x00", "\x06", "\ufffd",
]  # fmt: skip
SCRIPTS = [
    (32, 126), (0, 31), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF),
    (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x20A0, 0x2BFF), (0x3000, 0x30FF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0x1F000, 0x1FAFF), (0x1D400, 0x1D7FF),
    (0xFF00, 0xFFEF), (0xE0000, 0xE007F),
]  # fmt: skip


def hostile(drawn: random.Random) -> str:
    """A text of hard cases for tokenizers and of prose cut at arbitrary points."""
    made = []
    for _ in range(drawn.randint(0, 40)):
        kind = drawn.random()
        if kind < 0.4:
            made.append(drawn.choice(PIECES))
        elif kind < 0.5:
            text = drawn.choice(TEXTS)
            at = drawn.randrange(len(text))
            made.append(text[at : at + drawn.randint(1, 80)])
        else:
            first, last = drawn.choice(SCRIPTS)
            made += [chr(drawn.randint(first, last)) for _ in range(drawn.randint(1, 8))]
    return "".join(made)


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return [each.tolist() for each in one] == [each.tolist() for each in other]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_texts_have_the_same_ids(kind: str) -> None:
    tokenizer = KINDS[kind]()
    assert why_not_fast(tokenizer, TEXTS) is None
    drawn = random.Random(kind)
    for _ in range(60):
        texts = [hostile(drawn) for _ in range(20)]
        quick, wanted = ids_of(texts, tokenizer, True), ids_of(texts, tokenizer, False)
        for text, one, other in zip(texts, quick, wanted, strict=True):
            assert one.tolist() == other.tolist(), text
    long = ["x" * 50_000, " " * 50_000, "x y " * 20_000, "北京" * 5000]
    assert same(ids_of(long, tokenizer, True), ids_of(long, tokenizer, False))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_minute_of_hostile_texts_have_the_same_ids(kind: str) -> None:
    tokenizer, drawn = KINDS[kind](), random.Random()
    until = time.monotonic() + 60 / len(KINDS)
    while time.monotonic() < until:
        text = hostile(drawn)
        assert same(ids_of([text], tokenizer, True), ids_of([text], tokenizer, False)), text


def unigram() -> str:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.normalizer = normalizers.NFKC()
    made.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=800, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False
        ),
    )
    return made.to_str()


def word_level() -> str:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, **TAGS}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(TAGS))
    return made.to_str()


TAGS = {"<s>": 3, "</s>": 4}
SPELLED = {
    **{kind: (make, ["<|endoftext|>", "<|im_start|>"]) for kind, make in KINDS.items()},
    "Unigram": (unigram, ["<|endoftext|>", "<|im_start|>"]),
    "WordLevel": (word_level, list(TAGS)),
}


@pytest.mark.parametrize("kind", SPELLED)
def test_control_tokens_that_a_text_spells_out_stay_text(kind: str) -> None:
    make, (one, two) = SPELLED[kind]
    tokenizer = make()
    loaded = Tokenizer.from_str(tokenizer)
    control = {loaded.token_to_id(one), loaded.token_to_id(two)}
    texts = [f"a {one} b", f"{one}{two}", "a b", f"b{one[:2]} a"]
    for fast in (False, True) if kind in KINDS else (False,):
        tokens, plain = ids_of(texts, tokenizer, fast), text_ids(texts, tokenizer, fast)
        assert [bool(control & set(each.tolist())) for each in tokens] == [True, True, False, False]
        assert not any(control & set(each.tolist()) for each in plain)
        assert same(plain[2:], tokens[2:])
        assert same(text_ids(texts, tokenizer, fast), plain)
        assert same(ids_of(texts, tokenizer, fast), tokens)  # the setting is not sticky
        scorer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer))
        for text, as_token, as_text in zip(texts, tokens, plain, strict=True):
            # evaluate scores the ids that training sees
            assert scored_ids(text, scorer, False) == as_token.tolist()
            assert scored_ids(text, scorer, True) == as_text.tolist()
        if kind in KINDS and "SmolLM2" not in kind:
            found = "".join(loaded.id_to_token(each) or "" for each in plain[0].tolist())
            assert found.replace("Ġ", " ").replace("▁", " ").strip() == texts[0]


@pytest.mark.parametrize("kind", SPELLED)
def test_control_tokens_that_a_turn_spells_out_stay_text(kind: str) -> None:
    make, (one, two) = SPELLED[kind]
    tokenizer = make()
    loaded = Tokenizer.from_str(tokenizer)
    text = f"a {one} b{two} a{two}"
    at = [(match.start(), match.end()) for match in re.finditer(re.escape(two), text)]
    spelled = ((2, 2 + len(one)), at[0])
    encoder = Encoder(tokenizer, lambda texts: ids_of(texts, tokenizer, False))
    (made,) = encoder.encode([Plain(Rendered(text, ((2, len(text)),)), spelled)])
    assert isinstance(made, Masked)
    control = np.array([loaded.token_to_id(one), loaded.token_to_id(two)], np.int64)
    assert np.isin(made.ids, control).nonzero()[0].tolist() == [len(made.ids) - 1]
    assert made.learned[-1, -1] == len(made.ids)
    assert made.learned[0, 0] == len(loaded.encode("a ", add_special_tokens=False).ids)


def test_a_setting_makes_spelled_out_control_tokens_those_tokens(tiny_model: Path) -> None:
    tokenizer = (tiny_model / "tokenizer.json").read_text(encoding="utf-8")
    special = next(t for t in json.loads(tokenizer)["added_tokens"] if t["special"])
    line = json.dumps({"text": f"One {special['content']} two."}).encode()
    found = {}
    for is_text in (True, False):
        encoded = encode(line, Encoding(tokenizer, 0, "<u2", is_control_text=is_text))
        found[is_text] = np.frombuffer(encoded.ids, "<u2")[:-1].tolist()
    assert special["id"] in found[False]
    assert special["id"] not in found[True]
    recipe = "base_model: x\ntokenize: {control_tokens_in_texts: token}"
    assert evaluate_settings(recipe).control_tokens_in_texts == "token"
    assert evaluate_settings("base_model: x").control_tokens_in_texts == "text"


def test_tokenizers_handles_the_kinds_that_fastokens_refuses(
    run: Run, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = unigram()
    why = why_not_fast(tokenizer, TEXTS)
    assert why is not None
    assert "unsupported" in why
    model = tmp_path / "unigram"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    made = {run(f"tokens-{n}", base_model=str(model), processes=n) for n in (1, 2)}
    assert len({sha256_tree(folder) for folder in made}) == 1
    assert "tokenize: slower, without fastokens: " in capsys.readouterr().err


def test_different_ids_are_detected_and_not_used(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = sha256_tree(run("right"))
    assert "slower" not in capsys.readouterr().err
    quickly = ids._quickly

    def wrong(texts: list[str], tokenizer: str) -> list[np.ndarray]:
        return [found[::-1] for found in quickly(texts, tokenizer)]

    monkeypatch.setattr(ids, "_quickly", wrong)
    assert sha256_tree(run("checked")) == wanted
    assert "differ from those of Hugging Face's tokenizers" in capsys.readouterr().err


def test_only_the_first_texts_of_the_corpus_are_compared() -> None:
    def texts() -> Iterator[str]:
        for number in range(1000):
            assert number < 8, "it read on"
            yield "word " * 10_000

    assert why_not_fast(KINDS["GPT-2"](), texts()) is None
