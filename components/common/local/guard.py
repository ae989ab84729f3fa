"""Who may ask a server of this machine: whoever has its token, under one of this machine's names.

Any user of the machine can connect to a port of 127.0.0.1, and so can any web page that is open in
a browser: a page reads the answers once its own host name resolves to 127.0.0.1 (DNS rebinding),
and sends forms without that. The token keeps both out. The Host header and the content type are
checked as well, so that no request of a page is even looked at.
"""

import json
import os
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nudge.components.common.local.state_file import damaged, read_text

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""The names under which a server of this machine answers, whatever the port."""
OPEN = ("/health", "/readyz/health")
"""The paths that need no token; they report nothing but that the server is up."""
WRITES = ("POST", "PUT", "PATCH")
JSON = ("application/json", "application/merge-patch+json")
TOKEN_BYTES = 32
TOKEN = re.compile(r"[\w-]{40,}", re.ASCII)
TOKEN_REMEDY = (
    "delete it, then run `nudge services down` and `nudge services up`, which make a new one"
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application in front of another one.

    It answers 421 to a foreign Host, 401 without the bearer token, and 415 to a write that is not
    JSON; everything else goes through.
    """

    def __init__(self, app: App, token: str) -> None:
        if not token:
            raise ValueError("a guard needs a token")
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            raise RuntimeError(f"a {scope['type']} connection is not for this server")
        elif refusal := self._refusal(scope):
            await _refuse(send, *refusal)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        host = b",".join(headers.get(b"host", [])).decode("latin-1")
        if name_of(host) not in HOSTS:
            return 421, "this server answers to 127.0.0.1 and localhost only"
        if scope["path"] not in OPEN or scope["method"] not in ("GET", "HEAD"):
            given = b",".join(headers.get(b"authorization", []))
            if not secrets.compare_digest(given, self._expected):
                return 401, "the bearer token is missing or wrong"
        kind = b",".join(headers.get(b"content-type", [])).decode("latin-1")
        if scope["method"] in WRITES and kind.partition(";")[0].strip().lower() not in JSON:
            return 415, f"the content type {kind!r} is not accepted; send application/json"
        return None


def name_of(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def is_here(url: str) -> bool:
    """Whether a URL's host is this machine; one that only begins like it (``127.0.0.1:1@host``) is
    not."""
    try:
        return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    except ValueError:
        return False


async def _refuse(send: Send, status: int, why: str) -> None:
    body = json.dumps({"code": str(status), "message": why, "detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def token_file(home: Path, name: str) -> Path:
    """The file that holds the token of a server below ``home``, which is made once.

    Raises `Damaged` if it has no token: an empty one would let everybody in.
    """
    path = home / "services" / f"{name}.token"
    if not path.is_file():
        _write_private(path, secrets.token_urlsafe(TOKEN_BYTES))
    _read_token(path)
    return path


def _read_token(path: Path) -> str:
    token = read_text(path, TOKEN_REMEDY)
    if not TOKEN.fullmatch(token):
        raise damaged(path, "it has no token", TOKEN_REMEDY)
    return token


def header_file(home: Path, name: str) -> Path:
    """The file with the same token as a header, for ``curl -H @FILE``.

    A token in curl's arguments would be in the list of processes, which every user can read.
    """
    path = token_file(home, name).with_suffix(".header")
    header = f"Authorization: Bearer {read_token(home, name)}\n"
    if path.is_file() and path.read_bytes() != header.encode():
        path.unlink()  # damaged, or of an earlier token
    if not path.is_file():
        _write_private(path, header)
    return path


def read_token(home: Path, name: str) -> str:
    """The token of a server below ``home``; raises `Damaged` as `token_file` does."""
    return _read_token(token_file(home, name))


def _write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600; of two processes that write the same path, the first one does."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)
        except FileExistsError:
            return
    finally:
        part.unlink(missing_ok=True)
