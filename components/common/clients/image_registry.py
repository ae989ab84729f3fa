"""A client of image registries over HTTP; it needs no daemon.

It implements the OCI distribution specification
(https://github.com/opencontainers/distribution-spec/blob/main/spec.md). Credentials
(`image_credentials`) appear in no error and in no log, and they go to the registry and its token
server only: over https, and never to the target of a redirect on another host. Every answer is read
up to a limit.

The libraries for this (oras, olot) read an image from files on disk, which would store a model
twice. Here a layer is packed and unpacked while it is sent (see `modelcar`).
"""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urljoin

import httpx
import tenacity

from nudge.components.common.clients.image_credentials import (
    LOOPBACK,
    check_realm,
    find_credentials,
)
from nudge.components.common.clients.image_reference import Reference
from nudge.components.common.clients.tls import tls_context
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.retries import BACKOFF, BUSY
from nudge.components.common.core.sanitize import visible

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
ACCEPTED = (
    INDEX,
    MANIFEST,
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)

ATTEMPTS = 8
BLOCK = 1 << 20
MANIFEST_BYTES = 4 << 20
"""The largest manifest or token that is read; the specification asks registries for as much."""
BLOB_BYTES = 8 << 20
"""The largest blob that is read into memory, unless the caller sets another limit."""
ERROR_BYTES = 64 << 10
HINTS = {
    401: "it does not accept the credentials, or there are none; provide a pull secret for it "
    "(REGISTRY_AUTH_FILE, or ~/.docker/config.json as `podman login` or `docker login` writes it)",
    403: "these credentials do not allow it",
    404: "it does not exist there",
    413: "the registry, or a proxy in front of it, accepts no request of that size",
}
Content = Callable[[], Iterator[bytes]]


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


class Busy(Exception):
    """An answer after which the request may be repeated."""


class Missing(UserError):
    """The registry does not have it."""


class Repository:
    """One repository of a registry; requests are repeated while the registry is busy or away.

    Every method raises a `UserError` with the request, the registry and its answer.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._credentials, self._authorization = find_credentials(reference), ""
        host, _, _ = reference.registry.partition(":")
        plain = host in LOOPBACK
        self._plain = plain
        api = "registry-1.docker.io" if host == "docker.io" else reference.registry
        self._client = httpx.Client(
            base_url=f"{'http' if plain else 'https'}://{api}/v2/{reference.repository}/",
            timeout=httpx.Timeout(60.0, connect=10.0),
            verify=True if plain else tls_context(),
            follow_redirects=True,
            headers={"accept-encoding": "identity"},
            event_hooks={"request": [self._check_scheme]},
        )

    def close(self) -> None:
        self._client.close()

    def _check_scheme(self, request: httpx.Request) -> None:
        """Refuse a request, also one that follows a redirect, that would go out unencrypted."""
        if request.url.scheme == "https" or (self._plain and request.url.host in LOOPBACK):
            return
        raise UserError(
            f"the registry of {self.reference.uri} sends to {_origin(request.url)}: only https is "
            "accepted"
        )

    def digest(self, name: str) -> str:
        """The digest of the manifest of a tag or digest; empty if there is none."""
        try:
            answer = self._ask("HEAD", f"manifests/{name}", ok=(200,), headers=_accept())
        except Missing:
            return ""
        return answer.headers.get("docker-content-digest") or digest_of(self.manifest(name))

    def manifest(self, name: str) -> bytes:
        """The manifest or index of a tag or digest."""
        answer = self._ask("GET", f"manifests/{name}", ok=(200,), headers=_accept())
        if name.startswith("sha256:") and digest_of(answer.content) != name:
            raise UserError(f"{self._at(name)} is damaged: its content has another digest")
        return answer.content

    def put_manifest(self, name: str, body: bytes, media: str) -> None:
        """Store a manifest under its digest or a tag."""
        self._ask(
            "PUT", f"manifests/{name}", ok=(201,), content=body, headers={"content-type": media}
        )

    def has_blob(self, digest: str) -> bool:
        try:
            self._ask("HEAD", f"blobs/{digest}", ok=(200,))
        except Missing:
            return False
        return True

    def put_blob(self, digest: str, size: int, content: Content) -> None:
        """Store ``size`` bytes; every call of ``content`` returns them from the start.

        The registry accepts them only if they have this digest.
        """
        for attempt in _attempts(self._at(digest)):
            with attempt:
                if attempt.retry_state.attempt_number > 1 and self.has_blob(digest):
                    return  # the registry has it; only its answer was lost
                begun = self._once("POST", "blobs/uploads/", ok=(202,))
                target = httpx.URL(urljoin(str(begun.url), begun.headers["location"]))
                self._once(
                    "PUT",
                    str(target.copy_add_param("digest", digest)),
                    ok=(201,),
                    content=content,
                    headers={
                        "content-length": str(size),
                        "content-type": "application/octet-stream",
                    },
                    again=(404,),  # the registry forgot the upload that was begun
                )

    def blob(self, digest: str, most: int = BLOB_BYTES) -> bytes:
        """A blob of at most ``most`` bytes, such as a configuration, checked against its digest."""
        body = self._ask("GET", f"blobs/{digest}", ok=(200,), most=most).content
        if digest_of(body) != digest:
            raise UserError(f"{self._at(digest)} is damaged: its content has another digest")
        return body

    def read_blob(
        self, digest: str, take: Callable[[Iterator[bytes]], None], size: int | None = None
    ) -> None:
        """Let ``take`` read a blob; it is called from the start after a connection breaks.

        Raises `UserError` if the bytes do not have the digest, or are more than ``size``.
        """
        for attempt in _attempts(self._at(digest)):
            with attempt, self._sent("GET", f"blobs/{digest}", (200,)) as answer:
                sha256 = hashlib.sha256()
                stream = self._hashed(answer, sha256, digest, size)
                take(stream)
                for _ in stream:  # bytes after the end of an archive count for the digest too
                    pass
                if f"sha256:{sha256.hexdigest()}" != digest:
                    raise UserError(
                        f"{self._at(digest)} is damaged: its content has the digest "
                        f"sha256:{sha256.hexdigest()}"
                    )

    def _hashed(
        self, answer: httpx.Response, sha256: Any, digest: str, size: int | None
    ) -> Iterator[bytes]:
        seen = 0
        for chunk in answer.iter_raw(BLOCK):
            seen += len(chunk)
            if size is not None and seen > size:
                raise UserError(
                    f"{self._at(digest)} is larger than the {size} bytes of its manifest"
                )
            sha256.update(chunk)
            yield chunk

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        for attempt in _attempts(self._at(path.rpartition("/")[2])):
            with attempt:
                answer = self._once(method, path, **more)
        return answer

    def _once(
        self,
        method: str,
        path: str,
        ok: tuple[int, ...],
        most: int = MANIFEST_BYTES,
        **more: Any,
    ) -> httpx.Response:
        with self._sent(method, path, ok, **more) as answer:
            return self._read(answer, most)

    def _read(self, answer: httpx.Response, most: int) -> httpx.Response:
        """The answer with its body; raises `UserError` if that has more than ``most`` bytes."""
        body, whole = _at_most(answer, most)
        if not whole:
            raise UserError(
                f"the registry of {self.reference.uri}: {answer.request.method} answered more than "
                f"{most} bytes"
            )
        # The body is read already; a response made from it has no limit to keep.
        return httpx.Response(
            answer.status_code, headers=_plain_headers(answer), content=body, request=answer.request
        )

    @contextlib.contextmanager
    def _sent(
        self,
        method: str,
        path: str,
        ok: tuple[int, ...],
        content: Content | bytes | None = None,
        headers: dict[str, str] | None = None,
        again: tuple[int, ...] = (),
    ) -> Iterator[httpx.Response]:
        """The answer to a request before its body is read; one challenge is answered.

        Raises `Busy` after a status of ``again``, as after those of a busy registry. An address on
        another host, as a registry may return for an upload, gets no credentials.
        """
        for challenged in (False, True):
            body = content() if callable(content) else content
            own = _origin(self._client.base_url.join(path)) == _origin(self._client.base_url)
            known = {"authorization": self._authorization} if self._authorization and own else {}
            with self._client.stream(
                method, path, content=body, headers={**(headers or {}), **known}
            ) as answer:
                if answer.status_code == 401 and own and not challenged and self._authorize(answer):
                    continue
                self._judge(answer, ok, (*BUSY, *again))
                yield answer
                return

    def _authorize(self, answer: httpx.Response) -> bool:
        """Answer a registry's challenge with credentials or a token; False if that is impossible.

        https://distribution.github.io/distribution/spec/auth/token/
        """
        if _origin(answer.request.url) != _origin(self._client.base_url):
            return False  # the target of a redirect
        kind, _, rest = answer.headers.get("www-authenticate", "").partition(" ")
        challenge = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if kind.lower() == "basic" and self._credentials:
            pair = f"{self._credentials.user}:{self._credentials.password}".encode()
            self._authorization = f"Basic {base64.b64encode(pair).decode()}"
            return True
        if kind.lower() != "bearer" or "realm" not in challenge:
            return False
        check_realm(self._client.base_url.host, challenge["realm"])
        wanted = {key: challenge[key] for key in ("service", "scope") if key in challenge}
        known, auth = self._credentials, None
        request = self._client.build_request("GET", challenge["realm"], params=wanted)
        if known and known.identity_token:
            # https://distribution.github.io/distribution/spec/auth/oauth/
            wanted |= {"grant_type": "refresh_token", "client_id": "nudge"}
            wanted["refresh_token"] = known.identity_token
            request = self._client.build_request("POST", challenge["realm"], data=wanted)
        elif known:
            auth = httpx.BasicAuth(known.user, known.password)
        reply = self._client.send(request, auth=auth, follow_redirects=False, stream=True)
        try:
            self._judge(reply, (200,))
            content = self._read(reply, MANIFEST_BYTES).content
        finally:
            reply.close()
        try:
            body = json.loads(content)
            self._authorization = f"Bearer {body.get('token') or body['access_token']}"
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"the registry of {self.reference.uri} returned no token") from None
        return True

    def _judge(
        self, answer: httpx.Response, ok: tuple[int, ...], busy: tuple[int, ...] = BUSY
    ) -> None:
        status = answer.status_code
        if status in ok:
            return
        body, _ = _at_most(answer, ERROR_BYTES)
        if status in busy:
            raise Busy(f"it answers {status}")
        found = f"{answer.request.method} answered {status}{_errors(body)}"
        hint = f": {HINTS[status]}" if status in HINTS else ""
        kind = Missing if status == 404 else UserError
        raise kind(f"the registry of {self.reference.uri}: {found}{hint}")

    def _at(self, what: str) -> str:
        return f"{what} of oci://{self.reference.registry}/{self.reference.repository}"


@contextlib.contextmanager
def repository(reference: Reference) -> Iterator[Repository]:
    """A `Repository` for the time of the block."""
    with contextlib.closing(Repository(reference)) as opened:
        yield opened


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.host, port


def _at_most(answer: httpx.Response, most: int) -> tuple[bytes, bool]:
    """The start of a body, at most ``most`` bytes, and whether that is all of it."""
    parts, left = [], most
    for chunk in answer.iter_raw(BLOCK):
        parts.append(chunk[:left])
        if len(chunk) > left:
            return b"".join(parts), False
        left -= len(chunk)
    return b"".join(parts), True


def _plain_headers(answer: httpx.Response) -> dict[str, str]:
    encoded = ("content-encoding", "content-length", "transfer-encoding")
    return {key: value for key, value in answer.headers.items() if key not in encoded}


def _accept() -> dict[str, str]:
    return {"accept": ", ".join(ACCEPTED)}


def _errors(body: bytes) -> str:
    """The first errors in the body of a registry's answer."""
    try:
        errors = json.loads(body)["errors"]
        found = "".join(f", {each.get('code')}: {each.get('message')}" for each in errors[:2])
        return visible(found)[:1000]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _attempts(what: str) -> Iterator[Any]:
    """Attempts while the registry is busy or does not answer; in the end a `UserError`."""
    try:
        yield from tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=BACKOFF,
            retry=tenacity.retry_if_exception_type((Busy, httpx.TransportError)),
            reraise=True,
        )
    except (Busy, httpx.TransportError) as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{what}: the registry cannot be used now, {why}; run it again") from None
