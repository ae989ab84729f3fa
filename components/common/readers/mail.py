"""Mail: .eml and .msg (Outlook) files and .mbox archives; one document per message, its subject and
body."""

import email
import email.policy
import re
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.readers import records
from nudge.components.common.readers.records import Page, ReadOptions, Record, Records, lines, whole
from nudge.components.common.readers.unreadable import Unreadable

ENCRYPTED = ("application/pkcs7-mime", "application/x-pkcs7-mime", "multipart/encrypted")
"""S/MIME and PGP. A signed message of the first kind is encoded too."""


def read_eml(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """One message."""
    raw = whole(stream)
    text: Any = raw if isinstance(raw, Unreadable) else Page(raw, message_text, ("lxml.html",))
    yield Record(PurePosixPath(name).name, text)


def read_mbox(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """Every message of an archive (mboxrd and mboxo)."""
    for number, raw in enumerate(_messages(stream), 1):
        text: Any = raw if isinstance(raw, Unreadable) else Page(raw, message_text, ("lxml.html",))
        yield Record(f"{PurePosixPath(name).name}:{number}", text)


def read_msg(stream: IO[bytes], name: str, _: ReadOptions) -> Records:
    """One message that Outlook saved."""
    raw = whole(stream)
    needs = ("oxmsg", "lxml.html")
    text: Any = raw if isinstance(raw, Unreadable) else Page(raw, outlook_text, needs)
    yield Record(PurePosixPath(name).name, text)


def outlook_text(raw: bytes) -> str | Unreadable:
    """The subject and the body of Outlook's message; plain text if it has any, else its HTML."""
    from oxmsg import Message

    from nudge.components.common.readers.web import all_text

    message = Message.load(raw)
    content = (message.body or "").replace("\r\n", "\n")
    if not content.strip() and message.html_body:
        content = all_text(message.html_body.encode("utf-8", "replace"))
    return _joined(message.subject, content) or Unreadable("no_text", bytes=len(raw))


def message_text(raw: bytes) -> str | Unreadable:
    """The subject and the body of a message and of those attached to it; a body's plain text if it
    has any, else its HTML. Other attachments are left out."""
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    content = "\n\n".join(filter(None, map(_content, _messages_in(message))))
    if content:
        return content
    if message.get_content_type() in ENCRYPTED:
        return Unreadable("encrypted", "encrypted mail", len(raw))
    return Unreadable("no_text", bytes=len(raw))


def _messages_in(message: EmailMessage) -> Iterator[EmailMessage]:
    """The message and, after it, those that were attached to it, as when one is forwarded."""
    for part in message.walk():
        if part is message or part.get_content_type() == "message/rfc822":
            found = part if part is message else part.get_payload(0)
            if isinstance(found, EmailMessage):
                yield found


def _content(message: EmailMessage) -> str:
    """The subject and the body; empty without a body, since a subject alone says little."""
    from nudge.components.common.readers.web import all_text

    body = message.get_body(preferencelist=("plain", "html"))
    content = ""
    if body is not None:
        try:
            content = str(body.get_content())
        except (LookupError, ValueError):  # an encoding of an unknown name
            payload = body.get_payload(decode=True)
            content = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""
        if body.get_content_subtype() == "html":
            content = all_text(content.encode("utf-8", "replace"))
    return _joined(str(message.get("subject", "")), content) if content.strip() else ""


def _joined(subject: str, content: str) -> str:
    return "\n\n".join(part for part in (subject.strip(), content.strip()) if part)


def _messages(stream: IO[bytes]) -> Iterator[bytes | Unreadable]:
    parts: list[bytes] = []
    size = 0
    is_after_blank = True
    for line in lines(stream):
        if isinstance(line, Unreadable):
            size += line.bytes
            continue
        if is_after_blank and line.startswith(b"From "):
            if size:
                yield _message(parts, size)
            parts, size = [], 0
        else:
            size += len(line)
            if size <= records.RECORD_BYTES:
                parts.append(re.sub(rb"^>(>*From )", rb"\1", line))
        is_after_blank = not line.strip()
    if size:
        yield _message(parts, size)


def _message(parts: list[bytes], size: int) -> bytes | Unreadable:
    raw = b"".join(parts)
    return raw if size <= records.RECORD_BYTES else Unreadable("too_long", bytes=size)
