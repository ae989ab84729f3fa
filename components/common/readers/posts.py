"""Chats between people, a document per day: text, or a conversation if one of them is learned."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nudge.components.common.chat.conversation import Conversation, Message, checked
from nudge.components.common.chat.refusals import Refusal
from nudge.components.common.readers.records import ReadOptions, Record, Records
from nudge.components.common.readers.unreadable import Unreadable


class Post(NamedTuple):
    """One message of a chat."""

    author: str
    text: str
    """Empty for a photo, a call or another message without words."""
    day: str
    at: float = 0
    """When it was sent, in any unit; posts of a day are sorted by it."""


def days(posts: Iterable[Post | Unreadable], options: ReadOptions, chat: str = "") -> Records:
    """One document per day, named by it and by the ``chat``, if that is set."""
    latest = ""

    def day_of(post: Post | Unreadable) -> str:
        nonlocal latest
        if isinstance(post, Post):
            latest = post.day
        return latest

    for day, group in itertools.groupby(posts, key=day_of):
        of_day: list[Post] = []
        lost: list[Unreadable] = []
        for post in group:
            if isinstance(post, Unreadable):
                lost.append(post)
            else:
                of_day.append(post)
        if of_day:
            of_day.sort(key=lambda post: post.at)
            written = [post for post in of_day if post.text.strip()]
            name = f"{chat}:{day}" if chat else day
            yield Record(name, _document(written, options) if written else Unreadable("not_text"))
        yield from (Record(chat, each) for each in lost)


def transcript(turns: Iterable[tuple[str, str]], between: str = "\n") -> str:
    """Turns of an author and a text as ``Author: text``."""
    return between.join(f"{author}: {text.strip()}" for author, text in turns)


def conversation(turns: Iterable[tuple[str, str]]) -> Conversation | Unreadable:
    """The conversation of pairs of a role and a text, or why it cannot be learned.

    Consecutive texts of one role become one turn, and answers before the first prompt are left out.
    """
    messages = [Message(role, text) for role, text in _joined(turns)]
    if messages and messages[0].role == "assistant":
        del messages[0]
    try:
        return checked(Conversation(tuple(messages)))
    except Refusal as refusal:
        size = sum(len(message.content.encode("utf-8", "replace")) for message in messages)
        return Unreadable(refusal.reason, refusal.detail, size)


def _document(posts: list[Post], options: ReadOptions) -> str | Conversation | Unreadable:
    if options.format != "text" and options.assistant_name:
        learned = options.assistant_name.casefold()
        return conversation(
            ("assistant" if post.author.casefold() == learned else "user", post.text.strip())
            for post in posts
        )
    text = transcript((post.author, post.text) for post in posts)
    if options.format == "chat":
        why = "a chat between people; name the one to learn in ingest.assistant_name"
        return Unreadable("not_a_conversation", why, len(text.encode("utf-8", "replace")))
    return text


def _joined(turns: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for role, group in itertools.groupby(turns, key=lambda turn: turn[0]):
        yield role, "\n\n".join(text.strip() for _, text in group if text.strip())
