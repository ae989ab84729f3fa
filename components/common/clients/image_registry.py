"""Image registries, spoken to over HTTP: no daemon is needed.

What is asked is the OCI distribution specification
(https://github.com/opencontainers/distribution-spec/blob/main/spec.md). Credentials are those that
podman and docker know (``auths`` of a pull secret); they are in no error and in no log.

The libraries for this (oras, olot) take an image as files that lie on the disk, so a model would
lie there twice; here a layer is made and unpacked while it is sent (see `modelcar`).
"""

import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import tenacity

from nudge.components.common.clients.tls import tls_context
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.images import POD_CREDENTIALS

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
BUSY = (429, 500, 502, 503, 504)
BLOCK = 1 << 20
HINTS = {
    401: "no credentials that it knows: give a pull secret for it (REGISTRY_AUTH_FILE, or "
    "~/.docker/config.json as `podman login` or `docker login` writes it)",
    403: "these credentials may not do that",
    404: "it does not have that",
    413: "it (or a proxy before it) takes no request of that size",
}

Content = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Reference:
    """An image: ``registry`` is host and port, and one of ``tag`` and ``digest`` may be empty."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """What stands in a request for its manifest."""
        return self.digest or self.tag

    @property
    def uri(self) -> str:
        end = f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""
        return f"oci://{self.registry}/{self.repository}{end}"


PARTS = re.compile(
    r"(?P<registry>[A-Za-z0-9.-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?)/"
    r"(?P<repository>[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)


def parse(uri: str) -> Reference:
    """An image's reference from ``oci://registry/path[:tag][@digest]``; raises `UserError`."""
    found = PARTS.fullmatch(uri.removeprefix("oci://"))
    host = found["registry"].partition(":")[0] if found else ""
    if found is None or not ("." in host or host == "localhost" or host[0] == "["):
        raise UserError(
            f"{uri} names no image: expected oci://registry/path[:tag][@sha256:...], all of the "
            "path in lower case, such as oci://quay.io/team/models"
        )
    return Reference(
        found["registry"], found["repository"], found["tag"] or "", found["digest"] or ""
    )


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


class Busy(Exception):
    """An answer after which the same may be asked again."""


class Missing(UserError):
    """The registry has no such thing."""


class Repository:
    """One repository of a registry; requests are repeated while the registry is busy or away.

    Every method raises `UserError` that says what was asked of which registry, and what came.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._credentials, self._authorization = _credentials(reference), ""
        host, _, _ = reference.registry.partition(":")
        plain = host in ("localhost", "127.0.0.1")
        api = "registry-1.docker.io" if host == "docker.io" else reference.registry
        self._client = httpx.Client(
            base_url=f"{'http' if plain else 'https'}://{api}/v2/{reference.repository}/",
            timeout=httpx.Timeout(60.0, connect=10.0),
            verify=True if plain else tls_context(),
            follow_redirects=True,
        )

    def close(self) -> None:
        self._client.close()

    def digest(self, name: str) -> str:
        """The digest of the manifest of a tag (or digest); empty if there is none."""
        try:
            answer = self._ask("HEAD", f"manifests/{name}", ok=(200,), headers=_accept())
        except Missing:
            return ""
        return answer.headers.get("docker-content-digest") or digest_of(self.manifest(name))

    def manifest(self, name: str) -> bytes:
        """The manifest or index of a tag or digest."""
        answer = self._ask("GET", f"manifests/{name}", ok=(200,), headers=_accept())
        if name.startswith("sha256:") and digest_of(answer.content) != name:
            raise UserError(f"{self._at(name)} is damaged: it does not have the digest it is named")
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
        """Store ``size`` bytes; ``content`` gives them anew each time that they are asked for.

        The registry takes them only if they have this digest.
        """
        for attempt in _attempts(self._at(digest)):
            with attempt:
                if attempt.retry_state.attempt_number > 1 and self.has_blob(digest):
                    return  # the answer to it was lost
                begun = self._once("POST", "blobs/uploads/", ok=(202,))
                place = httpx.URL(urljoin(str(begun.url), begun.headers["location"]))
                self._once(
                    "PUT",
                    str(place.copy_add_param("digest", digest)),
                    ok=(201,),
                    content=content,
                    headers={
                        "content-length": str(size),
                        "content-type": "application/octet-stream",
                    },
                    again=(404,),  # the upload that was begun is forgotten
                )

    def blob(self, digest: str) -> bytes:
        """A small blob, such as an image's configuration, checked against its digest."""
        body = self._ask("GET", f"blobs/{digest}", ok=(200,)).content
        if digest_of(body) != digest:
            raise UserError(f"{self._at(digest)} is damaged: its content has another digest")
        return body

    def read_blob(self, digest: str, take: Callable[[Iterator[bytes]], None]) -> None:
        """Have ``take`` read a blob of any size; called again from the start if that breaks off.

        Raises `UserError` if the bytes do not have the digest.
        """
        for attempt in _attempts(self._at(digest)):
            with attempt, self._sent("GET", f"blobs/{digest}", (200,)) as answer:
                sha256 = hashlib.sha256()
                stream = _hashed(answer, sha256)
                take(stream)
                for _ in stream:  # what follows the end of an archive belongs to the digest too
                    pass
                if f"sha256:{sha256.hexdigest()}" != digest:
                    raise UserError(
                        f"{self._at(digest)} is damaged: its content has the digest "
                        f"sha256:{sha256.hexdigest()}"
                    )

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        for attempt in _attempts(self._at(path.rpartition("/")[2])):
            with attempt:
                answer = self._once(method, path, **more)
        return answer

    def _once(self, method: str, path: str, ok: tuple[int, ...], **more: Any) -> httpx.Response:
        with self._sent(method, path, ok, **more) as answer:
            answer.read()
        return answer

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
        """The answer to a request, its body not read yet; a challenge is met once.

        Raises `Busy` after a status of ``again``, as after those of a busy registry.
        """
        for challenged in (False, True):
            body = content() if callable(content) else content
            known = {"authorization": self._authorization} if self._authorization else {}
            with self._client.stream(
                method, path, content=body, headers={**(headers or {}), **known}
            ) as answer:
                if answer.status_code == 401 and not challenged and self._authorize(answer):
                    continue
                self._judge(answer, ok, (*BUSY, *again))
                yield answer
                return

    def _authorize(self, answer: httpx.Response) -> bool:
        """Take up a registry's challenge: credentials, or the token that they get; False if none.

        https://distribution.github.io/distribution/spec/auth/token/
        """
        kind, _, rest = answer.headers.get("www-authenticate", "").partition(" ")
        told = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if kind.lower() == "basic" and self._credentials:
            pair = ":".join(self._credentials).encode()
            self._authorization = f"Basic {base64.b64encode(pair).decode()}"
            return True
        if kind.lower() != "bearer" or "realm" not in told:
            return False
        asked = {key: told[key] for key in ("service", "scope") if key in told}
        given = httpx.BasicAuth(*self._credentials) if self._credentials else None
        granted = self._client.get(told["realm"], params=asked, auth=given)
        self._judge(granted, (200,))
        body = granted.json()
        self._authorization = f"Bearer {body.get('token') or body['access_token']}"
        return True

    def _judge(
        self, answer: httpx.Response, ok: tuple[int, ...], busy: tuple[int, ...] = BUSY
    ) -> None:
        status = answer.status_code
        if status in ok:
            return
        answer.read()
        if status in busy:
            raise Busy(f"it answers {status}")
        told = f"{answer.request.method} answered {status}{_told(answer)}"
        hint = f": {HINTS[status]}" if status in HINTS else ""
        kind = Missing if status == 404 else UserError
        raise kind(f"the registry of {self.reference.uri}: {told}{hint}")

    def _at(self, what: str) -> str:
        return f"{what} of oci://{self.reference.registry}/{self.reference.repository}"


@contextlib.contextmanager
def repository(reference: Reference) -> Iterator[Repository]:
    """A `Repository` for the time of the block."""
    with contextlib.closing(Repository(reference)) as opened:
        yield opened


def _hashed(answer: httpx.Response, sha256: Any) -> Iterator[bytes]:
    for chunk in answer.iter_raw(BLOCK):
        sha256.update(chunk)
        yield chunk


def _accept() -> dict[str, str]:
    return {"accept": ", ".join(ACCEPTED)}


def _told(answer: httpx.Response) -> str:
    """What a registry says is wrong, in its own words."""
    try:
        errors = answer.json()["errors"]
        return "".join(f", {each.get('code')}: {each.get('message')}" for each in errors[:2])
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _attempts(what: str) -> Iterator[Any]:
    """Tries of one thing, while the registry is busy or does not answer; then a `UserError`."""
    try:
        yield from tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(0.2, max=8),
            retry=tenacity.retry_if_exception_type((Busy, httpx.TransportError)),
            reraise=True,
        )
    except (Busy, httpx.TransportError) as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{what}: the registry cannot be used now, {why}; run it again") from None


def _credentials(reference: Reference) -> tuple[str, str] | None:
    """User and password for a repository, by the longest entry that fits it, as podman looks."""
    name = f"{reference.registry}/{reference.repository}"
    places = [name[: match.start()] for match in re.finditer("/", name)] + [name]
    if reference.registry == "docker.io":
        places.insert(0, "https://index.docker.io/v1/")
    for path in _credential_files():
        try:
            entries = json.loads(path.read_text(encoding="utf-8")).get("auths", {})
        except (OSError, ValueError, AttributeError):
            raise UserError(f"{path} cannot be read as a pull secret (JSON with auths)") from None
        for entry in (entries[place] for place in reversed(places) if place in entries):
            if entry.get("username"):
                return entry["username"], entry.get("password", "")
            if entry.get("auth"):
                user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
                return user, password
    return None


def _credential_files() -> list[Path]:
    docker = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    named = os.environ.get("REGISTRY_AUTH_FILE")
    podman = os.environ.get("XDG_RUNTIME_DIR")
    paths = [
        *([Path(named)] if named else []),
        POD_CREDENTIALS,
        *([Path(podman) / "containers" / "auth.json"] if podman else []),
        docker / "config.json",
    ]
    return [path for path in paths if path.is_file()]
