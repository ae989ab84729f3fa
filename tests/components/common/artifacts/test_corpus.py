"""Corpora with conversations, and corpora of older releases."""

import json
from pathlib import Path

from nudge.components.common.artifacts.corpus import (
    SPLITS,
    Document,
    read_corpus,
    read_documents,
    text_sha256,
    write_corpus,
)
from nudge.components.common.chat import conversation_of

CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
CHAT = conversation_of(
    {
        "messages": [
            {"role": "user", "content": "Wie viel ist 1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Zwei.", "reasoning_content": "1 + 1", "weight": 0},
            {"role": "user", "content": "Danke!"},
            {"role": "assistant", "content": "Gern."},
        ],
        "tools": [{"name": "add"}],
    }
)


def test_texts_and_conversations_share_a_corpus(tmp_path: Path) -> None:
    documents = [
        Document("a", "One text.", "file:///a"),
        Document("b", "", "file:///b", license="MIT", conversation=CHAT),
    ]
    documents.sort(key=lambda document: text_sha256(document.body))
    facts = {"conversations": 1, "documents": 2}
    write_corpus(tmp_path, {"train": documents, "validation": documents[:1]}, facts)
    assert list(read_documents(tmp_path, "train")) == documents
    manifest = read_corpus(tmp_path)
    assert manifest.conversations == manifest.splits["train"].conversations == 1
    assert manifest.splits["train"].documents == 2
    assert set(manifest.splits) == set(SPLITS)


def test_a_conversation_is_the_messages_format(tmp_path: Path) -> None:
    assert json.loads(CHAT.to_json())["messages"][3] == {
        "role": "assistant",
        "content": "Zwei.",
        "reasoning_content": "1 + 1",
        "train": False,
    }
    assert conversation_of(json.loads(CHAT.to_json())) == CHAT


def test_the_corpus_of_an_older_release_is_text() -> None:
    folder = Path(__file__).parent / "written_by_0_1" / "corpus"
    assert read_corpus(folder).conversations == 0
