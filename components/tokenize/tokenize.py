"""The step `tokenize`: turns a corpus into token shards with document offsets."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import (
    published,
    sha256_file,
    sha256_tree,
    verify_file,
)
from nudge.components.common.core.say import say
from nudge.components.common.core.step import step
from nudge.components.tokenize.chats import Account
from nudge.components.tokenize.settings import TokenizeSettings

if TYPE_CHECKING:
    from nudge.components.common.artifacts.chat_facts import ChatFacts
    from nudge.components.common.artifacts.corpus import Corpus
    from nudge.components.common.artifacts.tokens import TokenShard, TokenSplit
    from nudge.components.tokenize.chats import Chat
    from nudge.components.tokenize.encode import Encoding

LEARNABLE = 0.5
"""With a smaller share of conversations that can be learned from, something is wrong with them or
with the template, and training on the rest would hide it."""


@dataclass(frozen=True)
class Shard:
    """A shard of the corpus, the token shard that is made from it alone, and what became of its
    conversations."""

    split: str
    corpus: Path
    sha256: str
    documents: int
    bytes: int
    tokens: Path
    account: Account = field(default_factory=Account)


@step("tokenize", outputs=("tokens",))
def tokenize(settings: TokenizeSettings, *, corpus: Path, tokens: Path) -> dict[str, Any]:
    """Tokenize both splits with the base model's tokenizer, or with one trained on the corpus.

    ``tokens`` becomes a tokens artifact (`nudge.components.common.artifacts.tokens`): one token
    shard per corpus shard, and the tokenizer's folder. A shard has each document's ids and one
    end-of-document id, as uint16 or uint32 depending on the size of the vocabulary. A conversation
    is rendered with the chat template, and its learned tokens are marked. The number of processes
    and the engine do not change a byte, and memory does not grow with the corpus.

    Raises `UserError` if the corpus or the tokenizer cannot be read, or if most conversations
    cannot be learned from.
    """
    from nudge.components.common.artifacts.corpus import SPLITS, read_corpus, read_documents
    from nudge.components.common.artifacts.tokens import Tokens, token_dtype, write_tokens_manifest
    from nudge.components.common.core.environment import usable_cores
    from nudge.components.common.core.progress import progress
    from nudge.components.common.models.end_of_document import end_of_document_id
    from nudge.components.tokenize.encode import Encoding
    from nudge.components.tokenize.ids import why_not_fast

    source = read_corpus(corpus)
    if settings.engine == "local":  # read once, when the first text is tokenized
        os.environ["RAYON_NUM_THREADS"] = str(settings.processes or usable_cores())
    with (
        published(tokens) as part,
        progress("tokenize", total=source.documents, unit="documents") as bar,
    ):
        tokenizer = _tokenizer(settings, corpus, part / "tokenizer", bar)
        end, dtype = end_of_document_id(tokenizer), token_dtype(len(tokenizer))
        chat, facts = _chat(settings, source, tokenizer, part / "tokenizer")
        text = (part / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
        shards = [
            Shard(split, corpus / shard.file, shard.sha256, shard.documents,
                  shard.bytes, part / f"{split}-{number:05d}.tokens")
            for split in SPLITS
            for number, shard in enumerate(source.splits[split].shards)
        ]  # fmt: skip
        why_not = why_not_fast(text, (one.plain_text for one in read_documents(corpus, "train")))
        if why_not:
            say(f"tokenize: slower, without fastokens: {why_not}")
        bar.note(stage="tokenizing")
        is_text = settings.control_tokens_in_texts == "text"
        encoding = Encoding(text, end, dtype.str, why_not is None, chat, is_text)
        _write(settings, shards, encoding, bar)
        if facts is not None:
            _check_learnable(source, shards, facts)
        splits = {
            split: _split([one for one in shards if one.split == split], facts is not None)
            for split in SPLITS
        }
        manifest = Tokens(
            corpus_fingerprint=source.fingerprint,
            tokenizer=settings.tokenizer,
            tokenizer_sha256=sha256_tree(part / "tokenizer"),
            vocab_size=len(tokenizer),
            dtype=dtype.name,
            end_of_document_id=end,
            splits=splits,
            chat=facts,
        )
        write_tokens_manifest(part, manifest)
    return {
        **_chat_results(shards, splits, facts),
        "train_tokens": splits["train"].tokens,
        "validation_tokens": splits["validation"].tokens,
        **{key: getattr(manifest, key) for key in ("vocab_size", "dtype", "tokenizer_sha256")},
    }


def _tokenizer(settings: TokenizeSettings, corpus: Path, folder: Path, bar: Any) -> Any:
    """The tokenizer as transformers loads it; it is also saved into ``folder``."""
    if settings.tokenizer == "train":
        from nudge.components.common.artifacts.corpus import read_documents
        from nudge.components.tokenize.learn import train_tokenizer

        bar.note(stage="training the tokenizer")
        texts = (document.plain_text for document in read_documents(corpus, "train"))
        return train_tokenizer(texts, settings, folder)
    from nudge.components.common.models.base_checks import check_vocabulary
    from nudge.components.common.models.base_model import local_tokenizer, open_tokenizer

    bar.note(stage="loading the tokenizer")
    found = local_tokenizer(settings.base_model)
    tokenizer = open_tokenizer(found, settings.base_model)
    if (found / "config.json").is_file():  # a GGUF file is complete in itself
        check_vocabulary(found, settings.base_model, len(tokenizer))
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"base_model {settings.base_model}: its {type(tokenizer).__name__} cannot be saved as "
            "tokenizer.json; choose a model with a fast tokenizer (Hugging Face tokenizers)"
        )
    return tokenizer


def _write(settings: TokenizeSettings, shards: list[Shard], encoding: "Encoding", bar: Any) -> None:
    """Write the file of every shard."""
    from nudge.components.common.core.environment import usable_cores
    from nudge.components.tokenize.encode import BLOCK_BYTES

    processes = settings.processes or usable_cores()
    if settings.engine == "ray":
        from nudge.components.tokenize.on_ray import write_on_ray

        write_on_ray(shards, encoding, settings.ray_address, processes, bar)
        return
    # Starting a process takes about as long as four blocks.
    worth = sum(shard.bytes for shard in shards) // (4 * BLOCK_BYTES)
    _write_here(shards, encoding, max(1, min(processes, worth)), bar)


def _write_here(shards: list[Shard], encoding: "Encoding", processes: int, bar: Any) -> None:
    import numpy as np

    from nudge.components.common.artifacts.tokens import ShardWriter
    from nudge.components.tokenize.encode import encode_all

    encoded = encode_all(_blocks(shards), encoding, processes)
    done = 0
    for shard, parts in itertools.groupby(encoded, key=lambda pair: pair[0]):
        with shard.tokens.open("wb") as file:
            writer = ShardWriter(file, np.dtype(encoding.dtype))
            for _, part in parts:
                part.append_to(writer)
                shard.account.add(part.account)
                done += int(part.lengths.sum())
                bar.advance(part.records, tokens=done)
            writer.finish()
            assert writer.records == shard.documents, f"{writer.records} records of {shard}"


def _blocks(shards: list[Shard]) -> Iterator[tuple[Shard, bytes]]:
    from nudge.components.common.artifacts.corpus import read_lines
    from nudge.components.tokenize.encode import BLOCK_BYTES

    for shard in shards:
        verify_file(shard.corpus, shard.sha256)
        with shard.corpus.open("rb") as file:
            for block in read_lines(file, BLOCK_BYTES):
                yield shard, block


def _split(shards: list[Shard], has_chats: bool) -> "TokenSplit":
    """The manifest's entry for a split."""
    from nudge.components.common.artifacts.tokens import TokenSplit

    entries = [_entry(shard, has_chats) for shard in shards]

    def total(name: str) -> int:
        return sum(getattr(entry, name) or 0 for entry in entries)

    account = _account(shards)
    return TokenSplit(
        documents=total("documents"),
        tokens=total("tokens"),
        conversations=total("conversations") if has_chats else None,
        learned_tokens=total("learned_tokens") if has_chats else None,
        dropped=dict(account.refused) or None,
        shards=tuple(entries),
    )


def _entry(shard: Shard, has_chats: bool) -> "TokenShard":
    """The manifest's entry for a shard; asserts that no text was lost."""
    from nudge.components.common.artifacts.tokens import TokenShard, learned_counts, shard_counts

    documents, tokens = shard_counts(shard.tokens)
    conversations, learned = learned_counts(shard.tokens) if has_chats else (0, tokens)
    assert conversations or documents == shard.documents - shard.account.refused.total()
    return TokenShard(
        file=shard.tokens.name,
        sha256=sha256_file(shard.tokens),
        documents=documents,
        tokens=tokens,
        conversations=conversations if has_chats else None,
        learned_tokens=learned if has_chats else None,
        records=shard.documents if has_chats else None,
    )


def _account(shards: list[Shard]) -> Account:
    account = Account()
    for shard in shards:
        account.add(shard.account)
    return account


def _chat(
    settings: TokenizeSettings, source: "Corpus", tokenizer: Any, folder: Path
) -> "tuple[Chat | None, ChatFacts | None]":
    """How conversations become text; None for a corpus without any.

    The tokenizer's folder gets the template too, so that the trained model has it.
    """
    from nudge.components.common.artifacts.chat_facts import ChatFacts
    from nudge.components.common.chat import template_of_folder
    from nudge.components.tokenize.chats import Chat

    if not any(split.conversations for split in source.splits.values()):
        return None, None
    template = template_of_folder(folder, settings.chat_template)
    if tokenizer.chat_template != template.text:
        tokenizer.chat_template = template.text
        tokenizer.save_pretrained(folder)
    if template.source == "chatml":
        say(
            "tokenize: the base model has no chat template, so conversations are rendered as "
            "ChatML; set tokenize.chat_template for another one"
        )
    facts = ChatFacts(
        template=template.text,
        source=template.source,
        learn=settings.learn,
        end_of_turn=template.end_of_turn,
        end_of_turn_id=int(tokenizer.convert_tokens_to_ids(template.end_of_turn)),
    )
    chat = Chat.of(
        template,
        learn=settings.learn,
        max_tokens=settings.max_tokens,
        too_long=settings.too_long,
        spelled_out=settings.control_tokens,
    )
    return chat, facts


def _check_learnable(source: "Corpus", shards: list[Shard], facts: "ChatFacts") -> None:
    """Raise `UserError` if fewer than half the conversations can be learned from; report a smaller
    loss."""
    from nudge.components.common.chat import REASONS

    account = _account(shards)
    total = sum(split.conversations for split in source.splits.values())
    refused = account.refused.total()
    if not refused:
        return
    by_reason = account.refused.most_common()
    reasons = "; ".join(f"{count}: {REASONS[name]}" for name, count in by_reason)
    shown = "; ".join(f"{name} of {where}: {why}" for name, where, why in account.examples)
    message = f"{refused} of {total} conversations cannot be learned from ({reasons}): {shown}"
    if total - refused < LEARNABLE * total:
        whose = {"model": "the base model's", "recipe": "the recipe's", "chatml": "the ChatML"}
        raise UserError(
            f"{message}; they were rendered with {whose[facts.source]} chat template. Correct the "
            "data, set tokenize.chat_template, or raise tokenize.max_tokens"
        )
    say(f"tokenize: {message}")


def _chat_results(
    shards: list[Shard], splits: "dict[str, TokenSplit]", facts: "ChatFacts | None"
) -> dict[str, Any]:
    """The step's figures about conversations."""
    if facts is None:
        return {}
    account = _account(shards)
    return {
        "chat_template": facts.source,
        "learned_tokens": splits["train"].learned_tokens,
        "conversations_dropped": account.refused.total(),
        "conversations_shortened": account.shortened,
    }
