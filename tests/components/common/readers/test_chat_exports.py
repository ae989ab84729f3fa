"""Exports of chats: the turns that a person saw, as conversations where the roles are known."""

import json
from typing import Any

import pytest

from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.readers import (
    Record,
    Unreadable,
    records,
)
from tests.components.common.readers import reading


def read(value: Any, name: str = "conversations.json", **options: Any) -> list[Record]:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return reading.records(raw, name, **{"format": "auto"} | options)


def turns(record: Record) -> list[tuple[str, str]]:
    assert isinstance(record.text, Conversation), record
    return [(message.role, message.content) for message in record.text.messages]


def node(parent: str | None, role: str = "", *parts: Any, **more: Any) -> dict[str, Any]:
    """A node of ChatGPT's tree; ``more`` overrides fields of its message."""
    message = {
        "author": {"role": role, "name": None, "metadata": {}},
        "create_time": 1_700_000_000.5,
        "content": {"content_type": "text", "parts": list(parts)},
        "status": "finished_successfully",
        "weight": 1.0,
        "metadata": {},
        "recipient": "all",
        "channel": None,
        **more,
    }
    return {"id": "", "message": message if role else None, "parent": parent, "children": []}


def chatgpt(nodes: dict[str, dict[str, Any]], current: str | None) -> dict[str, Any]:
    for name, each in nodes.items():
        if each["parent"] in nodes:
            nodes[each["parent"]]["children"].append(name)
    return {
        "title": "Bread",
        "create_time": 1_700_000_000.5,
        "mapping": nodes,
        "current_node": current,
        "conversation_id": "6561-a",
        "id": "6561-a",
    }


def bread() -> dict[str, dict[str, Any]]:
    """A question that was asked twice, of whose second answer the model searched the web."""
    hidden = {"metadata": {"is_visually_hidden_from_conversation": True}}
    browse = {"content_type": "code", "language": "unknown", "text": "search('bread')"}
    thought = {"content_type": "thoughts", "thoughts": []}
    return {
        "root": node(None),
        "system": node("root", "system", "", **hidden),
        "about": node("system", "user", "I am a baker.", **hidden),
        "q1": node("about", "user", "How much salt?"),
        "a1": node("q1", "assistant", "Ten grams."),
        "q2": node("about", "user", "How much salt for a kilo of flour?"),
        "think": node("q2", "assistant", content=thought),
        "call": node("think", "assistant", content=browse, recipient="web"),
        "found": node("call", "tool", "Salt: 20 g"),
        "plan": node("found", "assistant", "Let me add that up.", channel="commentary"),
        "a2": node("plan", "assistant", "About 20 grams.\ue200cite\ue202turn0search0\ue201"),
        "a3": node("a2", "assistant", "Less for white bread."),
    }


def test_chatgpts_current_branch_is_one_conversation() -> None:
    asked = ("user", "How much salt for a kilo of flour?")
    answer = ("assistant", "About 20 grams.\n\nLess for white bread.")
    found = read([chatgpt(bread(), "a3"), chatgpt(bread(), "a1")])
    assert [record.name for record in found] == ["6561-a"] * 2
    assert turns(found[0]) == [asked, answer]
    assert turns(found[1]) == [("user", "How much salt?"), ("assistant", "Ten grams.")]
    later = bread()
    later["a1"]["message"]["create_time"] += 9
    assert turns(read([chatgpt(later, None)])[0]) == turns(found[1])  # the newest leaf
    text = "User: How much salt for a kilo of flour?\n\nAssistant: About 20 grams.\n\nAssistant: "
    assert read([chatgpt(bread(), "a3")], format="text")[0].text == f"{text}Less for white bread."


def test_a_tree_that_is_damaged_or_without_an_answer_is_counted() -> None:
    loop = bread()
    loop["root"]["parent"] = "a3"
    broken = chatgpt(bread(), "a3")
    broken["mapping"]["a3"]["message"] = {"author": None}
    picture = bread()
    picture["q2"]["message"]["content"] = {
        "content_type": "multimodal_text",
        "parts": [{"content_type": "image_asset_pointer", "asset_pointer": "file://x"}, "What?"],
    }
    values = [
        chatgpt(loop, "a3"),
        broken,
        chatgpt(picture, "a3"),
        chatgpt(bread(), "q2"),
        chatgpt({}, None),
        7,
    ]
    found = [r.text.reason if isinstance(r.text, Unreadable) else "" for r in read(values)]
    reasons = ["", "bad_record", "content_not_text", "no_assistant_turn", "no_messages"]
    assert found == [*reasons, "bad_record"]
    assert "User: What?" in str(read(values, format="text")[2].text)


def test_claudes_export_and_the_files_beside_it() -> None:
    human: dict[str, Any] = {"sender": "human", "text": "Summarize this.", "files": []}
    human["attachments"] = [{"file_name": "a.txt", "extracted_content": "The tower is tall."}]
    answer: dict[str, Any] = {"sender": "assistant", "text": "old form", "attachments": []}
    answer["content"] = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "It is"},
        {"type": "tool_use", "name": "search"},
        {"type": "text", "text": "tall."},
    ]
    photo = {"sender": "human", "text": "And this?", "files": [{"file_name": "a.png"}]}
    chat = {"uuid": "u1", "name": "Tower", "chat_messages": [human, answer]}
    seen = {"uuid": "u2", "name": "Photo", "chat_messages": [photo, answer]}
    first, second = read([chat, seen])
    assert turns(first) == [
        ("user", "Summarize this.\n\nThe tower is tall."),
        ("assistant", "It is\n\ntall."),
    ]
    assert first.name == "u1"
    assert second.text == Unreadable("content_not_text", "it has an image or a file", 21)
    for name in ("users.json", "user.json", "message_feedback.json"):
        for value in ([{"uuid": "a", "email": "b"}], {"id": "a"}, []):
            (found,) = [record.text for record in read(value, name)]
            assert isinstance(found, Unreadable)
            assert found.reason == "metadata"
    assert [record.text for record in read([{"text": "one"}], "users.json")] == ["one"]
    script = b"<html><script>var jsonData = [" + b'{"title": "x"}' * 99 + b"]</script></html>"
    assert read(script, "chat.html")[0].text == Unreadable("metadata")


def telegram() -> dict[str, Any]:
    link = ["See ", {"type": "link", "text": "https://a.example"}, " and ", "answer"]
    rows: list[dict[str, Any]] = [
        {"type": "service", "action": "create_group", "actor": "Ann", "text": ""},
        {"type": "message", "from": "Ann", "from_id": "user1", "text": link},
        {"type": "message", "from": "Ann", "from_id": "user1", "text": "Soon?"},
        {"type": "message", "from": "Bob", "from_id": "user2", "text": "Yes."},
        {"type": "message", "from": None, "from_id": "user3", "text": "Good."},
        {"type": "message", "from": "Bob", "from_id": "user2", "text": "", "photo": "x.jpg"},
    ]
    days = [1, 1, 1, 1, 2, 3]
    for number, (row, day) in enumerate(zip(rows, days, strict=True)):
        row |= {"id": number, "date": f"2024-03-0{day}T12:00:00", "date_unixtime": "1"}
        row["text_entities"] = []
    return {"name": "Bakers", "type": "private_group", "id": 7, "messages": rows}


def test_telegrams_chats_are_a_document_per_day() -> None:
    first = "Ann: See https://a.example and answer\nAnn: Soon?\nBob: Yes."
    expected = [
        ("2024-03-01", first),
        ("2024-03-02", "user3: Good."),
        ("2024-03-03", Unreadable("not_text")),
    ]
    assert [(r.name, r.text) for r in read(telegram(), "result.json")] == expected
    account = {"about": "x", "chats": {"about": "y", "list": [telegram(), telegram()]}}
    found = [(record.name, record.text) for record in read(account, "result.json")]
    assert found == [(f"Bakers:{name}", text) for name, text in expected] * 2
    left = {"left_chats": {"about": "z", "list": [telegram() | {"name": "Left"}]}}
    (*others, last) = read(account | left, "result.json")
    assert (len(others), last.name) == (8, "Left:2024-03-03")
    assert read(left, "result.json")[0].name == "Left:2024-03-01"
    (chat, *others) = read(telegram(), "result.json", assistant_name="bob")
    assert turns(chat) == [
        ("user", "See https://a.example and answer\n\nSoon?"),
        ("assistant", "Yes."),
    ]
    reasons = [r.text.reason for r in others if isinstance(r.text, Unreadable)]
    assert reasons == ["no_assistant_turn", "not_text"]
    refused = read(telegram(), "result.json", format="chat")[0].text
    assert isinstance(refused, Unreadable)
    assert (refused.reason, refused.bytes) == ("not_a_conversation", len(first))
    assert "ingest.assistant_name" in refused.detail
    damaged = telegram()
    del damaged["messages"][2]["date"]
    assert [(record.name, record.text) for record in read(damaged, "result.json")] == [
        ("2024-03-01", first.replace("Ann: Soon?\n", "")),
        ("", Unreadable("bad_record", "KeyError: 'date'")),
        *expected[1:],
    ]


def test_a_large_export_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    unnamed = {**telegram(), "name": None}
    unnamed["messages"] = unnamed["messages"][:2]  # its last day is the first of the next chat
    left = {"about": "", "list": [telegram() | {"name": None, "id": None}]}
    account = {"chats": {"list": [unnamed, telegram()]}, "left_chats": left}
    values = {
        "result.json": telegram(),
        "account.json": account,
        "left.json": {"about": "x", "left_chats": left},
        "conversations.json": [chatgpt(bread(), "a3")] * 3,
    }
    found = {name: [r[:2] for r in read(value, name)] for name, value in values.items()}
    assert [name for name, _ in found["account.json"]][:2] == ["7:2024-03-01", "Bakers:2024-03-01"]
    assert found["account.json"][-1][0] == "3:2024-03-03"
    monkeypatch.setattr(records, "RECORD_BYTES", 8000)
    monkeypatch.setattr("nudge.components.common.readers.large_json.CHUNK_BYTES", 64)
    for name, value in values.items():
        raw = json.dumps(value).encode()
        if isinstance(value, dict):
            raw = raw.replace(b"{", b"{" + b" " * 999)
        assert len(raw) > 8000
        assert [record[:2] for record in read(raw, name)] == found[name]
    raw = json.dumps(telegram()).encode().replace(b"{", b"{" + b" " * 1500)[:-2000]
    cut = [record.text for record in read(raw, "result.json")]
    assert cut[0] == found["result.json"][0][1]
    assert any(isinstance(text, Unreadable) and text.reason == "bad_record" for text in cut)


def test_slack_discord_and_facebook() -> None:
    ann = {"display_name": "", "real_name": "Ann Lee", "name": "ann"}
    slack: list[dict[str, Any]] = [
        {"type": "message", "subtype": "channel_join", "user": "U1", "text": "<@U1> has joined"},
        {"type": "message", "user": "U1", "user_profile": ann, "text": "Is &lt;it&gt; <@U2|Bob>?"},
        {"type": "message", "user": "U2", "text": "Yes, <https://a.example|here>, <!here>"},
    ]
    for number, row in enumerate(slack):
        row["ts"] = f"{1_709_294_400 + number}.000100"
    assert [(r.name, r.text) for r in read(slack, "general/2024-03-01.json")] == [
        ("2024-03-01", "Ann Lee: Is <it> @Bob?\nU2: Yes, here, @here")
    ]
    assert [r.text for r in read(slack, "a.json", text_column="user")] == ["U1", "U1", "U2"]
    discord: list[dict[str, Any]] = [
        {"type": kind, "author": {"name": "ann", "nickname": nick}, "content": text}
        for kind, nick, text in [
            ("RecipientAdd", "Ann", "joined"),
            ("Default", "Ann", "Hello"),
            ("Reply", None, "Hi"),
        ]
    ]
    for row in discord:
        row |= {"id": "1", "timestamp": "2024-03-01T12:00:00+00:00", "isPinned": False}
    found = read({"guild": {}, "messages": discord, "messageCount": 3}, "chat.json")
    assert [(r.name, r.text) for r in found] == [("2024-03-01", "Ann: Hello\nann: Hi")]
    facebook = [
        {"sender_name": "Zo\u00c3\u00ab", "timestamp_ms": 1_709_294_400_000 + at, "content": text}
        for at, text in ((2000, "Caf\u00c3\u00a9?"), (1000, "Hello"))
    ]
    found = read({"participants": [], "messages": facebook, "title": "Zo"}, "message_1.json")
    assert [(r.name, r.text) for r in found] == [("2024-03-01", "Zoë: Hello\nZoë: Café?")]


ANDROID = """31/01/2024, 21:05 - Messages and calls are end-to-end encrypted. Tap to learn more.
31/01/2024, 21:05 - Ann: Hello: how are you?
31/01/2024, 21:06 - Bob: Fine.
And you?
31/01/2024, 21:07 - Bob: <Media omitted>
01/02/2024, 08:00 - Ann left
01/02/2024, 08:01 - Bob: Bye.
"""
IPHONE = """[1/31/24, 9:05:10\u202fPM] Ann: Hello: how are you?
[1/31/24, 9:06:00\u202fPM] Bob: Fine.
And you?
\u200e[1/31/24, 9:07:00\u202fPM] Bob: \u200eimage omitted
[2/1/24, 8:01:00\u202fAM] Bob: Bye.
"""


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (ANDROID, "WhatsApp Chat with Bob.txt"),
        (ANDROID, "notes.txt"),
        (IPHONE, "_chat.txt"),
        (IPHONE, "a.txt"),
    ],
)
def test_whatsapps_export_is_a_document_per_day(text: str, name: str) -> None:
    first, second = read(text.encode(), name)
    assert first.text == "Ann: Hello: how are you?\nBob: Fine.\nAnd you?"
    assert second.text == "Bob: Bye."
    chat, _ = read(text.encode(), name, assistant_name="Bob")
    assert turns(chat) == [("user", "Hello: how are you?"), ("assistant", "Fine.\nAnd you?")]


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-31 12:00:00,123 - root: started\n" * 9,
        "[2024-01-31 12:00:00] INFO: started\n" * 9,
        "31/01/2024, 21:05 - Ann: only two\n31/01/2024, 21:05 - Bob: lines\n",
        "A diary.\n" + ANDROID,
    ],
)
def test_other_texts_with_dates_stay_as_they_are(text: str) -> None:
    assert [record.text for record in read(text.encode(), "a.txt")] == [text]
