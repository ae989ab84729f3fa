"""Notifications about how a run ended: a webhook, Slack, Teams and mail, once per event.

An address is a secret, because whoever knows a webhook's URL can post there. It is in no log, error
or artifact: what a library says of a request is not passed on, and its own log lines are dropped.

A channel that fails is reported in the step's log and result and never fails the run. With an
object store, a marker there remembers what was sent, so that a retry of the step sends nothing
again.
"""

import contextlib
import hashlib
import logging
import os
import smtplib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from email.message import EmailMessage
from typing import Any
from urllib.parse import unquote, urlsplit

import tenacity

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sanitize import masked, visible
from nudge.components.common.core.say import say
from nudge.components.summary.settings import Channel, NotifySettings

VARIABLES: dict[str, str] = {
    "webhook": "NUDGE_NOTIFY_WEBHOOK",
    "slack": "NUDGE_NOTIFY_SLACK",
    "teams": "NUDGE_NOTIFY_TEAMS",
    "email": "NUDGE_NOTIFY_SMTP",
}
"""The variable with the address of each channel."""
ATTEMPTS = 5
LONGEST_WAIT_S = 30.0
TIMEOUT_S = 20.0
LONGEST_TEXT = 3000
"""Characters of an event's text; Slack takes 3000 in a block."""
MARKERS = "nudge/notified"
"""The folder of the markers in the object store."""


@dataclass(frozen=True)
class Notice:
    """One event of one run; ``title`` is a line, ``text`` a few lines."""

    event: str
    run_id: str
    model: str
    version: str
    title: str
    text: str
    endpoint: str = ""


class NotSent(Exception):
    """A channel refused a notice or did not answer; the text has no address."""

    def __init__(self, why: str, *, worth_a_retry: bool) -> None:
        super().__init__(why)
        self.worth_a_retry = worth_a_retry


def missing_addresses(settings: NotifySettings) -> list[str]:
    """The variables that the channels of a recipe need and that are not set."""
    return [VARIABLES[name] for name in settings.channels if not os.environ.get(VARIABLES[name])]


def notify(settings: NotifySettings, notice: Notice) -> dict[str, str]:
    """Send a notice to each channel that wants it; returns "sent", "sent before" or an error, by
    channel."""
    if notice.event not in settings.events:
        return {}
    return {channel: _sent(channel, settings, notice) for channel in settings.channels}


def _sent(channel: Channel, settings: NotifySettings, notice: Notice) -> str:
    address = os.environ.get(VARIABLES[channel], "").strip()
    if not address:
        return f"not sent: {VARIABLES[channel]} is not set"
    marker = _marker(channel, notice)
    try:
        if marker and marker.is_set():
            return "sent before"
        with _silent():
            _retrying(lambda: SENDERS[channel](address, settings, notice))
    except NotSent as error:
        return f"not sent: {error}"
    if marker:
        marker.set()
    return "sent"


def _retrying(send: Callable[[], None]) -> None:
    tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(1.0, max=LONGEST_WAIT_S),
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, NotSent) and e.worth_a_retry),
        reraise=True,
    )(send)


def _post(url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
    import httpx

    try:
        answer = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:  # its text may have the address
        wrong = isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol)
        raise NotSent(type(error).__name__, worth_a_retry=not wrong) from None
    if answer.status_code >= 300:
        busy = answer.status_code == 429 or answer.status_code >= 500
        raise NotSent(f"it answered {answer.status_code}", worth_a_retry=busy)


def _webhook(url: str, _: NotifySettings, notice: Notice) -> None:
    key = hashlib.sha256(f"{notice.run_id}/{notice.event}".encode()).hexdigest()
    _post(url, asdict(notice), {"Idempotency-Key": key})


def _slack(url: str, _: NotifySettings, notice: Notice) -> None:
    # Slack reads &, < and > as its own markup
    # (https://docs.slack.dev/messaging/formatting-message-text).
    def plain(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

    text = {"type": "mrkdwn", "text": plain(notice.text)[:LONGEST_TEXT] or " "}
    head = {"type": "plain_text", "text": notice.title[:150]}
    blocks = [{"type": "header", "text": head}, {"type": "section", "text": text}]
    _post(url, {"text": plain(notice.title), "blocks": blocks})


def _teams(url: str, _: NotifySettings, notice: Notice) -> None:
    # An adaptive card, which the workflow "post to a channel when a webhook request is received"
    # takes (https://learn.microsoft.com/microsoftteams/platform/webhooks-and-connectors).
    card = {
        "type": "AdaptiveCard",
        "version": "1.4",
        "body": [
            {"type": "TextBlock", "text": notice.title, "weight": "Bolder", "wrap": True},
            {"type": "TextBlock", "text": notice.text, "wrap": True},
        ],
    }
    kind = "application/vnd.microsoft.card.adaptive"
    _post(url, {"type": "message", "attachments": [{"contentType": kind, "content": card}]})


def _email(address: str, settings: NotifySettings, notice: Notice) -> None:
    message = EmailMessage()
    message["Subject"] = f"[nudge] {notice.title}"
    message["From"] = settings.email_from or settings.email_to[0]
    message["To"] = ", ".join(settings.email_to)
    message.set_content(notice.text + (f"\n\n{notice.endpoint}" if notice.endpoint else "") + "\n")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if parts.scheme not in ("smtp", "smtps") or not host:
        raise NotSent("the address is not smtp://HOST:PORT or smtps://", worth_a_retry=False)
    context, accepted = ssl.create_default_context(), False
    try:
        if parts.scheme == "smtps":
            server: smtplib.SMTP = smtplib.SMTP_SSL(
                host, port or 465, timeout=TIMEOUT_S, context=context
            )
        else:
            server = smtplib.SMTP(host, port or 587, timeout=TIMEOUT_S)
        with server:
            server.ehlo()
            encrypted = parts.scheme == "smtps"
            if not encrypted and server.has_extn("starttls"):
                server.starttls(context=context)
                encrypted = True
            if parts.username:
                if not encrypted:
                    raise NotSent(
                        "the server offers no encryption, so the password was not sent",
                        worth_a_retry=False,
                    )
                server.login(unquote(parts.username), unquote(parts.password or ""))
            server.send_message(message)
            accepted = True
    except smtplib.SMTPResponseException as error:
        if accepted:  # only the goodbye failed
            return
        busy = 400 <= error.smtp_code < 500
        raise NotSent(f"the server answered {error.smtp_code}", worth_a_retry=busy) from None
    except (OSError, smtplib.SMTPException) as error:
        raise NotSent(type(error).__name__, worth_a_retry=True) from None


SENDERS: dict[str, Callable[[str, NotifySettings, Notice], None]] = {
    "webhook": _webhook,
    "slack": _slack,
    "teams": _teams,
    "email": _email,
}


@dataclass(frozen=True)
class _Marker:
    """An empty object whose existence says that a notice was sent."""

    client: Any
    bucket: str
    key: str

    def is_set(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client.head_object(Bucket=self.bucket, Key=self.key)
        except (ClientError, BotoCoreError):  # better twice than never
            return False
        return True

    def set(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client.put_object(Bucket=self.bucket, Key=self.key, Body=b"")
        except (ClientError, BotoCoreError) as error:
            say(f"notify: a retry may send this again ({masked(str(error))})", stdout=True)


def _marker(channel: str, notice: Notice) -> _Marker | None:
    bucket = os.environ.get("AWS_S3_BUCKET", "")
    if not bucket or not os.environ.get("AWS_ACCESS_KEY_ID"):
        return None
    from nudge.components.common.clients.storage import s3_client

    event = notice.event.replace(" ", "-")
    try:
        return _Marker(s3_client(), bucket, f"{MARKERS}/{notice.run_id}/{event}-{channel}")
    except UserError:
        return None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what libraries log meanwhile: httpx logs each URL at the level INFO."""
    loggers = [logging.getLogger(name) for name in ("httpx", "httpcore")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def shortened(text: str) -> str:
    """A text for people outside: no credentials, no control characters, the end of a long one."""
    shown = visible(masked(text)).strip()
    return shown if len(shown) <= LONGEST_TEXT else "…" + shown[-(LONGEST_TEXT - 1) :]
