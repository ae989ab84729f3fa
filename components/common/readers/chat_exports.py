"""Exports of chats (.json): with assistants (ChatGPT, Claude) and between people (Telegram, Slack,
Discord, Facebook and Instagram)."""

import datetime
import html
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.readers.posts import Post, conversation, days, transcript
from nudge.components.common.readers.records import ReadOptions, Record, Records
from nudge.components.common.readers.unreadable import Unreadable

ROW_KEYS = ("sender_name", "isPinned")
"""Keys of the messages in an export that has them below a key, without a key ``text``."""
CHAT_LISTS = ("chats", "left_chats")
"""The keys of the chats in Telegram's export of an account; the person has left the second ones."""
ALL_CHATS = tuple(f"{key}.list.item.messages.item" for key in CHAT_LISTS)
"""ijson's paths of the messages in them."""
CHAT = "nudge.chat"
"""The key for the number and the name of a message's chat, in a large export of an account."""
SIDE_FILES = frozenset(
    (
        *("canvases.json", "channels.json", "dms.json", "file_conversations.json", "groups.json"),
        *("integration_logs.json", "lists.json", "memories.json", "message_feedback.json"),
        *("model_comparisons.json", "mpims.json", "org_users.json", "projects.json"),
        *("shared_conversations.json", "user.json", "user_settings.json", "users.json"),
    )
)
"""Files beside the chats in the exports of ChatGPT, Claude and Slack, without any chat."""
NAMES = {"user": "User", "assistant": "Assistant"}
CITATION = re.compile("\ue200[^\ue201]*\ue201|【\\d+†[^】]*】")
"""How ChatGPT marks a source in an answer."""
SLACK_EVENTS = re.compile(r"(channel|group|bot)_(?!message)|reminder_|pinned_|tombstone|huddle_")
SLACK_LINK = re.compile(r"<([@#!]?)([^|>\s]+)(?:\|([^>]*))?>")


def exported(value: Any, options: ReadOptions) -> Records | None:
    """The documents of a JSON value that is an export of chats; None for any other value."""
    if not isinstance(value, dict):
        return exported_rows(iter(value), options) if isinstance(value, list) else None
    found = [value[key].get("list") for key in CHAT_LISTS if isinstance(value.get(key), dict)]
    if any(isinstance(chats, list) for chats in found):  # all of Telegram
        listed = itertools.chain(*(chats for chats in found if isinstance(chats, list)))
        return _telegrams([each for each in listed if isinstance(each, dict)], options)
    if isinstance(value.get("messages"), list):
        return exported_rows(iter(value["messages"]), options)
    return exported_rows(iter([value]), options)


def exported_rows(rows: Iterator[Any], options: ReadOptions) -> Records | None:
    """`exported` for the items of an array; if they are no chats, None, and the first is consumed.

    Only the messages of one day are in memory.
    """
    if options.text_column != "text":  # somebody knows better what a row is
        return None
    first = next(rows, None)
    if not isinstance(first, dict):
        return None
    for is_kind, read in ASSISTANTS:
        if is_kind(first):
            return _assistants(itertools.chain([first], rows), read, options)
    for is_kind, read_post in MESSENGERS:
        if is_kind(first):
            return _chats(itertools.chain([first], rows), read_post, options)
    return None


def _chats(rows: Iterable[Any], read: "Reads", options: ReadOptions) -> Records:
    for (_, name), group in itertools.groupby(rows, key=_chat_of):
        yield from days(_posts(group, read), options, name)


def _chat_of(row: Any) -> tuple[int, str]:
    number, name = row.get(CHAT, (0, "")) if isinstance(row, dict) else (0, "")
    return number, name


def _assistants(rows: Iterable[Any], read: "Turns", options: ReadOptions) -> Records:
    for number, row in enumerate(rows, 1):
        if isinstance(row, Unreadable):  # where a large file ends early
            yield Record(str(number), row)
            continue
        values = row if isinstance(row, dict) else {}
        name = next((values[key] for key in ("conversation_id", "id", "uuid") if key in values), "")
        try:
            turns, has_more = read(values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            detail = f"{type(error).__name__}: {error}"[:200]
            yield Record(str(name or number), Unreadable("bad_record", detail))
            continue
        yield Record(str(name or number), _body(turns, has_more, options))


def _body(
    turns: list[tuple[str, str]], has_more: bool, options: ReadOptions
) -> str | Conversation | Unreadable:
    if options.format == "text":
        text = transcript(((NAMES[role], text) for role, text in turns), "\n\n")
        return text or Unreadable("no_text")
    if has_more:  # an answer about a picture teaches a model without eyes to invent
        size = sum(len(text.encode("utf-8", "replace")) for _, text in turns)
        return Unreadable("content_not_text", "it has an image or a file", size)
    return conversation(turns)


Turns = Callable[[dict[str, Any]], tuple[list[tuple[str, str]], bool]]
"""A conversation's turns (role and text), and whether a prompt has more than text."""


def _chatgpt(row: dict[str, Any]) -> tuple[list[tuple[str, str]], bool]:
    """The branch that ends in the current node; what the user saw of it."""
    nodes = row["mapping"]
    at = row.get("current_node")
    if at not in nodes:  # the newest leaf
        leaves = [key for key, node in nodes.items() if not node.get("children")]
        at = max(leaves, key=lambda key: _time(nodes[key].get("message")), default=None)
    branch = []
    seen = set()
    while at in nodes and at not in seen:
        seen.add(at)
        branch.append(nodes[at].get("message"))
        at = nodes[at].get("parent")
    turns = []
    has_more = False
    for message in reversed(branch):
        if not message or not _is_seen(message):
            continue
        role, content = message["author"]["role"], message["content"]
        texts = []
        for part in content.get("parts") or ():
            if isinstance(part, str):
                texts.append(CITATION.sub("", part))
            elif isinstance(part, dict) and isinstance(part.get("text"), str):  # spoken words
                texts.append(part["text"])
            elif isinstance(part, dict) and "audio" not in str(part.get("content_type")):
                has_more |= role == "user"
        text = "\n".join(each for each in texts if each.strip()).strip()
        if text:
            turns.append((role, text))
    return turns, has_more


def _time(message: Any) -> float:
    found = message.get("create_time") if isinstance(message, dict) else None
    return float(found or 0)


def _is_seen(message: dict[str, Any]) -> bool:
    """Whether a message of ChatGPT is a prompt or an answer, not a tool call or a thought."""
    metadata = message.get("metadata") or {}
    return (
        message["author"]["role"] in NAMES
        and not metadata.get("is_visually_hidden_from_conversation")
        and message.get("recipient") in (None, "all")
        and message.get("channel") in (None, "final")
        and message["content"].get("content_type") in ("text", "multimodal_text")
    )


def _claude(row: dict[str, Any]) -> tuple[list[tuple[str, str]], bool]:
    turns = []
    has_more = False
    for message in row["chat_messages"]:
        role = {"human": "user"}.get(message["sender"], "assistant")
        parts = [
            part.get("text") or ""
            for part in message.get("content") or ()
            if part.get("type", "text") == "text"
        ]
        text = "\n\n".join(part for part in parts if part.strip()) or message.get("text") or ""
        attached = [each.get("extracted_content") for each in message.get("attachments") or ()]
        has_more |= role == "user" and bool(message.get("files") or not all(attached))
        turns.append((role, "\n\n".join(each for each in (text, *attached) if each)))
    return turns, has_more


ASSISTANTS: list[tuple[Callable[[dict[str, Any]], bool], Turns]] = [
    (lambda row: isinstance(row.get("mapping"), dict), _chatgpt),
    (lambda row: isinstance(row.get("chat_messages"), list), _claude),
]


def _telegrams(chats: list[dict[str, Any]], options: ReadOptions) -> Records:
    for number, chat in enumerate(chats, 1):
        posts = _posts(chat.get("messages") or (), _telegram)
        yield from days(posts, options, str(chat.get("name") or chat.get("id") or number))


def _posts(rows: Iterable[Any], read: "Reads") -> Iterator[Post | Unreadable]:
    """The posts of rows; an event, such as a call, is no post."""
    for row in rows:
        if isinstance(row, Unreadable):  # where a large file ends early
            yield row
            continue
        try:
            post = read(row)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            yield Unreadable("bad_record", f"{type(error).__name__}: {error}"[:200])
            continue
        if post is not None:
            yield post


Reads = Callable[[dict[str, Any]], Post | None]


def _telegram(row: dict[str, Any]) -> Post | None:
    if row.get("type") != "message":  # somebody joined, called, ...
        return None
    text = row.get("text") or ""
    if isinstance(text, list):  # links, mentions and bold words are objects
        text = "".join(part if isinstance(part, str) else part["text"] for part in text)
    author = row.get("from") or row.get("from_id") or "Unknown"
    return Post(str(author), text, row["date"][:10])


def _slack(row: dict[str, Any]) -> Post | None:
    if SLACK_EVENTS.match(row.get("subtype") or ""):
        return None
    who = row.get("user_profile") or row.get("bot_profile") or {}
    author = who.get("display_name") or who.get("real_name") or who.get("name")
    author = author or row.get("username") or row.get("user") or "Unknown"
    text = html.unescape(SLACK_LINK.sub(_slack_link, row.get("text") or ""))
    at = float(row["ts"])
    day = datetime.datetime.fromtimestamp(at, datetime.UTC).date().isoformat()
    return Post(str(author), text, day, at)


def _slack_link(match: re.Match[str]) -> str:
    mark, target, label = match.groups()
    if mark == "!":
        return f"@{label or target}".replace("@@", "@")
    return mark + (label or target) if mark else label or target


def _discord(row: dict[str, Any]) -> Post | None:
    if row.get("type", "Default") not in ("Default", "Reply", 0, 19):
        return None
    author = row["author"].get("nickname") or row["author"]["name"]
    return Post(str(author), row.get("content") or "", row["timestamp"][:10])


def _facebook(row: dict[str, Any]) -> Post | None:
    """The newest is first in the file; each byte of the UTF-8 was written as a character."""
    at = float(row["timestamp_ms"])
    day = datetime.datetime.fromtimestamp(at / 1000, datetime.UTC).date().isoformat()
    return Post(_repaired(row["sender_name"]), _repaired(row.get("content") or ""), day, at)


def _repaired(text: str) -> str:
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _has(row: Mapping[str, Any], *keys: str) -> bool:
    return all(key in row for key in keys)


MESSENGERS: list[tuple[Callable[[dict[str, Any]], bool], Reads]] = [
    (lambda row: row.get("type") in ("message", "service") and _has(row, "id", "date", "text"),
     _telegram),
    (lambda row: row.get("type") == "message" and _has(row, "ts", "text"), _slack),
    (lambda row: isinstance(row.get("author"), dict) and _has(row, "timestamp", "content"),
     _discord),
    (lambda row: _has(row, "sender_name", "timestamp_ms"), _facebook),
]  # fmt: skip
