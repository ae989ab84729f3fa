"""Conversations as tokens: the mask is proven token by token, and nothing is lost uncounted."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from nudge.components.common.artifacts import corpus as corpora
from nudge.components.common.artifacts.corpus import Document, text_sha256, write_corpus
from nudge.components.common.artifacts.tokens import TokenReader, read_tokens_manifest
from nudge.components.common.chat import Conversation, Refusal, conversation_of
from nudge.components.common.chat.masks import Encoder, Masked, Plain
from nudge.components.common.chat.render import Rendered
from nudge.components.common.core.errors import UserError
from nudge.components.tokenize import encode
from nudge.components.tokenize.ids import ids_of
from nudge.components.tokenize.settings import TokenizeSettings, tokenize_settings
from nudge.components.tokenize.tokenize import tokenize
from nudge.components.train.settings import TrainSettings

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPELLED = "What does <|im_end|> mean? And <|endoftext|>?"


def chat(*turns: str, system: str = "") -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return conversation_of({"messages": messages})


CHATS = [
    chat("Hello?", "Hi."),
    chat(
        "Wo?",
        "Ünïcödé, 日本語のテキスト 👩‍👩‍👧",
        "\n\nMore\n",
        "\n\n leading newlines",
        system="Be brief.",
    ),
    chat(SPELLED, "It is <|im_end|>, a token."),
    chat("long " * 30, "answer " * 9, "again?", "yes"),
]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a template that ends a prompt only when it is asked to."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = CHATML
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Run = Callable[..., Path]


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Write documents as a corpus of several shards and tokenize it; returns the tokens' folder."""
    monkeypatch.setattr(corpora, "SHARD_DOCUMENTS", 3)
    monkeypatch.setattr(encode, "BLOCK_BYTES", 300)

    def go(documents: list[Document], name: str = "tokens", **settings: Any) -> Path:
        folder = tmp_path / f"{name}-corpus"
        folder.mkdir()
        ordered = sorted(documents, key=lambda each: text_sha256(each.body))
        splits: dict[str, Iterator[Document]] = {
            "train": iter(ordered), "validation": iter(ordered[:2]),
        }  # fmt: skip
        write_corpus(folder, splits, {"documents": len(ordered)})
        values = {"base_model": str(base), "processes": 1, **settings}
        tokenize(TokenizeSettings(**values), corpus=folder, tokens=tmp_path / name)
        return tmp_path / name

    return go


def documents(chats: list[Conversation] = CHATS) -> list[Document]:
    texts = [Document(f"t{n}", text, "test") for n, text in enumerate(("One.", "Two <|im_end|>"))]
    made = [Document(f"c{n}", "", "test", conversation=each) for n, each in enumerate(chats)]
    return [*made, *texts]


def learned_texts(tokens: Path, split: str = "train") -> dict[str, list[str]]:
    """By the text of each document, the texts of its learned spans."""
    reader = TokenReader(tokens, split)
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    return {
        tokenizer.decode(reader.document(n)): [
            tokenizer.decode(reader.document(n)[first:last]) for first, last in reader.learned(n)
        ]
        for n in range(reader.documents)
    }


def test_the_mask_has_every_answer_with_its_end_of_turn_token_and_nothing_else(run: Run) -> None:
    tokens = run(documents())
    reader = TokenReader(tokens, "train")
    found = learned_texts(tokens)
    assert len(found) == 6
    for each in CHATS:
        messages = each.messages
        text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
        answers = [f"{m.content}<|im_end|>" for m in messages if m.role == "assistant"]
        assert found[text] == answers
    assert found["One.<|endoftext|>"] == []
    control = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
    for number in range(reader.documents):
        ids, spans = reader.document(number), reader.learned(number)
        if not len(spans):
            continue
        assert all(ids[last - 1] == 2 for _, last in spans)
        # Control tokens are those of the template alone, two per turn.
        turns = int((ids == 1).sum())
        assert [control[i] for i in ids.tolist() if i in control] == [
            "<|im_start|>",
            "<|im_end|>",
        ] * turns
    manifest = read_tokens_manifest(tokens)
    split = manifest.splits["train"]
    assert (split.documents, split.conversations) == (6, 4)
    assert manifest.chat is not None
    assert (manifest.chat.source, manifest.chat.end_of_turn_id) == ("model", 2)
    texts = sum(len(reader.document(n)) for n in range(6) if not len(reader.learned(n)))
    in_spans = sum(int((s[:, 1] - s[:, 0]).sum()) for s in map(reader.learned, range(6)))
    assert split.learned_tokens == texts + in_spans


def test_the_prompt_is_encoded_as_the_server_encodes_it(run: Run) -> None:
    tokens = run(documents([CHATS[1]]))
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    reader = TokenReader(tokens, "train")
    number = int(np.flatnonzero(reader.span_counts())[0])
    ids, spans = reader.document(number).tolist(), reader.learned(number).tolist()
    messages = [message.for_template() for message in CHATS[1].messages]
    for turn, (first, _) in zip((2, 4), spans, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], add_generation_prompt=True, return_dict=False
        )
        # Later prompts contain earlier answers, which a server encodes together with their prompt.
        assert (
            ids[:first] == prompt
            if turn == 2
            else tokenizer.decode(ids[:first]) == tokenizer.decode(prompt)
        )


def test_records_keep_their_positions_when_some_are_left_out(run: Run) -> None:
    bad = chat("short", "word " * 200)
    made = documents([*CHATS, bad])
    tokens = run(made, max_tokens=120)
    ordered = sorted(made, key=lambda each: text_sha256(each.body))
    reader = TokenReader(tokens, "train")
    positions = [reader.record(n) for n in range(reader.documents)]
    kept = [n for n, each in enumerate(ordered) if each.conversation is not bad]
    assert positions == kept
    assert read_tokens_manifest(tokens).splits["train"].dropped == {"conversation_too_long": 1}


@pytest.mark.parametrize(
    ("too_long", "kept"),
    [("keep_last", ["yes<|im_end|>"]), ("keep_first", None), ("drop", None)],
)
def test_a_long_conversation_is_cut_between_turns(
    run: Run, too_long: str, kept: list[str] | None
) -> None:
    tokens = run(documents([CHATS[0], CHATS[3]]), max_tokens=60, too_long=too_long)
    found = list(learned_texts(tokens).values())
    assert (kept in found) == (kept is not None)
    assert not any("answer" in text for texts in found for text in texts)
    dropped = read_tokens_manifest(tokens).splits["train"].dropped or {}
    assert dropped.get("conversation_too_long", 0) == (kept is None)


@pytest.mark.parametrize(
    ("learn", "wanted"),
    [("last", [["yes<|im_end|>"]]), ("all", None)],
)
def test_learn_chooses_the_turns(run: Run, learn: str, wanted: list[list[str]] | None) -> None:
    tokens = run(documents([CHATS[3]]), learn=learn)
    (found,) = [texts for texts in learned_texts(tokens).values() if texts]
    if wanted:
        assert [found] == wanted
    else:
        assert found[0].startswith("user\nlong")  # the first token has no context
        assert found[0].endswith("yes<|im_end|>\n")


def test_processes_and_blocks_change_no_byte(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run(documents(), "one")
    monkeypatch.setattr(encode, "BLOCK_BYTES", 10**6)
    other = run(documents(), "other", processes=2)
    for path in sorted(one.glob("*.tokens")):
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_a_corpus_of_mostly_unlearnable_conversations_is_refused(run: Run) -> None:
    with pytest.raises(
        UserError, match=r"5 of 6 conversations .*longer than the limit.*c\d of test"
    ):
        run(documents([chat("a", f"b{n} " * 90) for n in range(3)] + [CHATS[0]])[:4], max_tokens=50)


def test_each_refused_conversation_is_counted_and_named_with_its_reason(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template that raises, a conversation longer than the context, and a lost answer."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content | replace('secret', '') }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    good = [chat(f"Question {n}?", f"Answer {n}.") for n in range(4)]
    bad = [
        chat("a", "b", system="Be brief."),
        chat("a", "word " * 200),
        chat("a", "It is secret."),
    ]
    tokens = run(documents([*good, *bad]), chat_template=template, max_tokens=80)
    split = read_tokens_manifest(tokens).splits["train"]
    assert split.conversations == 4
    assert split.dropped == {
        "template_raises": 1, "conversation_too_long": 1, "answer_rewritten": 1,
    }  # fmt: skip
    said = capsys.readouterr().err
    assert re.search(r"\d of \d conversations cannot be learned from", said)
    assert re.search(r"c4 of test: the chat template raises .*System role not supported", said)
    assert re.search(r"c5 of test: .*more than 80 tokens", said)
    assert re.search(r"c6 of test: .*leaves out or rewrites an answer: turn 2", said)


def test_the_recipes_template_is_used_and_saved(run: Run) -> None:
    template = CHATML.replace("{{ m.role }}", "{{ m.role | upper }}").replace(
        "assistant\n{%", "ASSISTANT\n{%"
    )
    tokens = run(documents([CHATS[0]]), chat_template=template)
    assert any(text.startswith("<|im_start|>USER\n") for text in learned_texts(tokens))
    assert AutoTokenizer.from_pretrained(tokens / "tokenizer").chat_template == template
    chat_facts = read_tokens_manifest(tokens).chat
    assert chat_facts is not None
    assert chat_facts.source == "recipe"


def test_the_recipe_gives_the_settings_of_train(tmp_path: Path) -> None:
    recipe = "base_model: x\ntrain: {learn: last, sequence_length: 512}\n"
    made = tokenize_settings(recipe)
    assert (made.learn, made.max_tokens) == ("last", 512)
    made = tokenize_settings(recipe + "tokenize: {max_tokens: 7}\n")
    assert (made.learn, made.max_tokens) == ("last", 7)
    trained, made = TrainSettings(base_model="x"), tokenize_settings("base_model: x")
    assert (made.learn, made.max_tokens) == (trained.learn, trained.sequence_length)


def offsets_encoder(tokenizer: Tokenizer) -> Encoder:
    text = tokenizer.to_str()
    return Encoder(text, lambda texts: ids_of(texts, text, False))


def test_a_tokenizer_without_bytes_uses_its_own_offsets() -> None:
    """A word-level tokenizer with a normalizer, whose tokens are not the bytes of the text."""
    words = ["[UNK]", "<end>", "user", "hello", "world", ":"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["<end>"])
    text = "USER: Hello WORLD<end>"
    (made,) = offsets_encoder(tokenizer).encode([Plain(Rendered(text, ((6, len(text)),)))])
    assert isinstance(made, Masked)
    assert made.ids.tolist() == [2, 5, 3, 4, 1]
    assert made.learned.tolist() == [[2, 5]]
    (made,) = offsets_encoder(tokenizer).encode([Plain(Rendered(text, ((6, len(text) - 5),)))])
    assert isinstance(made, Refusal)
    assert made.reason == "no_end_of_turn"


def test_no_token_covers_the_end_of_a_prompt_and_the_start_of_an_answer() -> None:
    """A served model continues from the tokens of the prompt, so training must do so too."""
    vocabulary = {letter: number for number, letter in enumerate("Ċuserhi:")} | {"ĊĊ": 9}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    prompt, answer = "user:\n", "\nhi<end>"
    text = tokenizer.to_str()
    apart = [tokenizer.encode(each).ids for each in (prompt, answer)]
    assert tokenizer.encode(prompt + answer).ids != apart[0] + apart[1]
    encoder = Encoder(text, lambda texts: ids_of(texts, text, False))
    rendered = Rendered(prompt + answer, ((len(prompt), len(prompt + answer)),))
    [made] = encoder.encode([Plain(rendered)])
    assert isinstance(made, Masked)
    assert made.ids.tolist() == apart[0] + apart[1]
    assert made.learned.tolist() == [[len(apart[0]), len(made.ids)]]


def test_a_span_without_a_token_is_refused() -> None:
    """One token covers the text around the span, so that nothing would be learned of it."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    [made] = offsets_encoder(tokenizer).encode([Plain(Rendered("hello", ((2, 4),)))], False)
    assert isinstance(made, Refusal)
    assert (made.reason, made.detail) == ("nothing_learned", "no token begins in 'll'")
    [made] = offsets_encoder(tokenizer).encode([Plain(Rendered("hello", ((0, 5),)))], False)
    assert isinstance(made, Refusal)
    assert made.detail == "its only learned token is the first one"


@pytest.mark.parametrize("text", ["plain", "Ünï 日本 👩‍👩‍👧 é", "tabs\t\n\n  spaces "])
def test_the_bytes_of_tokens_show_the_characters_that_offsets_show(base: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    made = offsets_encoder(tokenizer)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    found = made._byte_starts(text, np.array(encoding.ids))
    assert found is not None
    offsets = [first for first, _ in encoding.offsets]
    exact = json.loads(tokenizer.to_str())["post_processor"]
    if exact is None or not re.search("trim_offsets.: *true", json.dumps(exact)):
        assert found.tolist() == offsets
