"""A hostile image registry gets no credentials that are not its own, and no memory or disk."""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest

from nudge.components.common.artifacts import model_files
from nudge.components.common.clients import image_credentials, image_registry, modelcar
from nudge.components.common.clients.image_reference import parse_reference
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file
from nudge.components.deploy.verify import check_image
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from tests.image_registry import ImageRegistry, make_base_image

USER, PASSWORD = "canary", "canary-password"
BASIC = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
Answer = tuple[int, dict[str, str], bytes | Iterator[bytes]]


class Server:
    """A server of one address of this machine; ``seen`` has each request's path and headers."""

    def __init__(self, answer: Callable[[str, str], Answer], address: str = "127.0.0.1") -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.bodies: list[bytes] = []
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                outer.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                outer.bodies.append(self.rfile.read(int(self.headers.get("content-length") or 0)))
                status, headers, body = answer(self.command, self.path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if isinstance(body, bytes):
                    self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                with contextlib.suppress(OSError):  # the client hangs up
                    for part in [body] if isinstance(body, bytes) else body:
                        self.wfile.write(part)
                        outer.sent += len(part)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer((address, 0), Handler)
        self.host = f"{address}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def secrets(self) -> list[str]:
        """Every header that came with a credential."""
        return [headers["authorization"] for _, headers in self.seen if "authorization" in headers]


@pytest.fixture(autouse=True)
def one_attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(image_registry, "ATTEMPTS", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)


@pytest.fixture
def elsewhere() -> Iterator[Server]:
    """A server on another host than the registry's; it takes what it is sent."""
    with Server(lambda *_: (200, {}, b'{"token": "t"}'), "127.0.0.2") as server:
        yield server


def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    """A pull secret for the registry."""
    path = tmp_path / "auth.json"
    path.write_text(json.dumps({"auths": {host: {"username": USER, "password": PASSWORD}}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))


def opened(server: Server) -> Any:
    return image_registry.repository(parse_reference(f"oci://{server.host}/team/m:v1"))


def test_a_token_realm_on_another_host_gets_no_credentials(
    elsewhere: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    challenge = {"www-authenticate": f'Bearer realm="http://{elsewhere.host}/token",service="s"'}
    with Server(lambda *_: (401, challenge, b"")) as registry:
        known(monkeypatch, tmp_path, registry.host)
        with (
            opened(registry) as found,
            pytest.raises(UserError, match="expected https on 127.0.0.1"),
        ):
            found.manifest("v1")
    assert elsewhere.seen == []


def test_an_identity_token_is_exchanged_for_one_of_the_registry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(method: str, path: str) -> Answer:
        if path == "/token":
            return 200, {}, b'{"access_token": "short"}' if method == "POST" else b"{}"
        if registry.secrets():
            return 200, {}, b"the manifest"
        realm = f'Bearer realm="http://{registry.host}/token",service="s",scope="r"'
        return 401, {"www-authenticate": realm}, b""

    with Server(answer) as registry:
        path = tmp_path / "auth.json"
        path.write_text(json.dumps({"auths": {registry.host: {"identitytoken": PASSWORD}}}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
        with opened(registry) as found:
            assert found.manifest("v1") == b"the manifest"
        assert registry.secrets() == ["Bearer short"]
        exchanged = parse_qs(registry.bodies[1].decode())
    assert exchanged.pop("client_id") == ["nudge"]
    assert exchanged == {
        "grant_type": ["refresh_token"], "refresh_token": [PASSWORD], "service": ["s"],
        "scope": ["r"],
    }  # fmt: skip


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_token_realm_that_redirects_takes_no_credentials_along(
    status: int, elsewhere: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(_: str, path: str) -> Answer:
        if path.startswith("/token"):
            return status, {"location": f"http://{elsewhere.host}/token"}, b""
        realm = f'Bearer realm="http://{registry.host}/token"'
        return 401, {"www-authenticate": realm}, b""

    with Server(answer) as registry:
        known(monkeypatch, tmp_path, registry.host)
        with opened(registry) as found, pytest.raises(UserError):
            found.manifest("v1")
        assert BASIC in registry.secrets()
    assert elsewhere.seen == []


@pytest.mark.parametrize("status", [307, 308])
def test_an_identity_token_follows_no_redirect(
    status: int, elsewhere: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is in the body, which a client sends again to the target of these redirects."""
    monkeypatch.setattr(image_registry, "LOOPBACK", ("localhost", "127.0.0.1", "127.0.0.2"))

    def answer(_: str, path: str) -> Answer:
        if path.startswith("/token"):
            return status, {"location": f"http://{elsewhere.host}/token"}, b""
        realm = f'Bearer realm="http://{registry.host}/token"'
        return 401, {"www-authenticate": realm}, b""

    with Server(answer) as registry:
        path = tmp_path / "auth.json"
        path.write_text(json.dumps({"auths": {registry.host: {"identitytoken": PASSWORD}}}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
        with opened(registry) as found, pytest.raises(UserError):
            found.manifest("v1")
        assert PASSWORD.encode() in registry.bodies[1]
    assert elsewhere.bodies == []


@pytest.mark.parametrize(
    ("registry", "realm", "right"),
    [
        ("quay.io", "https://quay.io/v2/auth", True),
        ("registry-1.docker.io", "https://auth.docker.io/token", True),
        ("registry.example.com", "https://login.example.com/token", True),  # configured below
        ("quay.io", "http://quay.io/v2/auth", False),
        ("quay.io", "https://quay.io.evil.example/auth", False),
        ("quay.io", "https://quay.io@evil.example/auth", False),
        ("quay.io", "https://auth.docker.io/token", False),
        ("quay.io", "http://127.0.0.1:80/token", False),
        ("quay.io", "https://127.0.0.1/token", False),
        ("127.0.0.1", "https://evil.example/token", False),
        ("quay.io", "file:///etc/passwd", False),
        ("quay.io", "https://[bad/", False),
        ("quay.io", "", False),
    ],
)
def test_realms(registry: str, realm: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    more = "a.example=b.example, registry.example.com=login.example.com"
    monkeypatch.setenv(image_credentials.AUTH_HOSTS_VARIABLE, more)
    with contextlib.nullcontext() if right else pytest.raises(UserError, match="expected https"):
        image_credentials.check_realm(registry, realm)


def test_a_redirect_of_a_blob_to_another_host_takes_no_credentials_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = b"a layer"
    digest = image_registry.digest_of(body)
    with Server(lambda *_: (200, {}, body)) as store:

        def answer(_: str, path: str) -> Answer:
            if BASIC not in registry.secrets():
                return 401, {"www-authenticate": 'Basic realm="r"'}, b""
            return 307, {"location": f"http://{store.host}/blob"}, b""

        with Server(answer) as registry:
            known(monkeypatch, tmp_path, registry.host)
            with opened(registry) as found:
                assert found.blob(digest) == body
        assert len(store.seen) == 1
        assert store.secrets() == []


def test_a_redirect_that_asks_for_credentials_gets_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Server(lambda *_: (401, {"www-authenticate": 'Basic realm="r"'}, b"")) as thief:
        redirect = {"location": f"http://{thief.host}/blob"}
        with Server(lambda *_: (307, redirect, b"")) as registry:
            known(monkeypatch, tmp_path, registry.host)
            with opened(registry) as found, pytest.raises(UserError, match="401"):
                found.blob("sha256:" + "0" * 64)
            assert [*thief.secrets(), *registry.secrets()] == []


def test_an_upload_to_another_host_takes_no_credentials_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Server(lambda *_: (201, {}, b"")) as store:

        def answer(method: str, _: str) -> Answer:
            if BASIC not in registry.secrets():
                return 401, {"www-authenticate": 'Basic realm="r"'}, b""
            return 202, {"location": f"http://{store.host}/upload"}, b""

        with Server(answer) as registry:
            known(monkeypatch, tmp_path, registry.host)
            with opened(registry) as found:
                found.put_blob(image_registry.digest_of(b"x"), 1, lambda: iter([b"x"]))
        assert len(store.seen) == 1
        assert store.secrets() == []


@pytest.mark.parametrize("target", ["http://example.org/x", "http://169.254.169.254/latest"])
def test_a_redirect_to_plain_http_is_refused(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not even asked: a registry must not make this machine fetch what it cannot reach itself."""
    real = httpx.HTTPTransport.handle_request
    asked = []

    def watched(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.host not in image_credentials.LOOPBACK:
            return httpx.Response(200, content=b"secret")
        return real(self, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", watched)
    with (
        Server(lambda *_: (307, {"location": target}, b"")) as registry,
        opened(registry) as found,
        pytest.raises(UserError, match="only https is accepted"),
    ):
        found.blob("sha256:" + "0" * 64)
    assert asked == ["127.0.0.1"]


def endless() -> Iterator[bytes]:
    for _ in range(256):  # 256 MiB, were it all read
        yield b" " * (1 << 20)


@pytest.mark.parametrize("call", ["manifest", "blob", "read_blob", "error", "token"])
def test_an_endless_answer_is_cut_off(
    call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(_: str, path: str) -> Answer:
        if call == "token" and not path.startswith("/token"):
            realm = f'Bearer realm="http://{registry.host}/token"'
            return 401, {"www-authenticate": realm}, b""
        return 400 if call == "error" else 200, {}, endless()

    digest = "sha256:" + "0" * 64
    with Server(answer) as registry:
        known(monkeypatch, tmp_path, registry.host)
        with opened(registry) as found, pytest.raises(UserError):
            if call == "blob":
                found.blob(digest)
            elif call == "read_blob":
                found.read_blob(digest, lambda chunks: [None for _ in chunks] and None, 1 << 20)
            else:
                found.manifest("v1")
        time.sleep(0.2)
        # What the sockets of both sides buffer comes on top of the limit.
        assert registry.sent < 64 << 20


def image_of(layer: bytes, media: str) -> Callable[[str, str], Answer]:
    """A registry with one image of one layer."""
    digest = image_registry.digest_of(layer)
    described = {"mediaType": media, "digest": digest, "size": len(layer)}
    manifest = json.dumps({"schemaVersion": 2, "config": {}, "layers": [described]}).encode()
    return lambda _, path: (200, {}, layer if "/blobs/" in path else manifest)


@pytest.mark.parametrize("wanted", [("*",), ("small",)])
def test_a_layer_that_is_a_decompression_bomb_is_refused(
    wanted: tuple[str, ...], tmp_path: Path
) -> None:
    packed = io.BytesIO()
    zeros = b"\0" * (1 << 20)
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed:
        entry = tarfile.TarInfo("models/weights")
        entry.size = 200 << 20
        compressed.write(entry.tobuf())
        for _ in range(200):
            compressed.write(zeros)
    body = packed.getvalue()
    assert len(body) < 1 << 20
    with Server(image_of(body, f"{image_registry.LAYER}+gzip")) as registry:
        uri = f"oci://{registry.host}/team/m:v1"
        with pytest.raises(UserError, match="decompression bomb"):
            modelcar.download_image(uri, tmp_path / "back", wanted)
    assert not (tmp_path / "back").exists() or not any((tmp_path / "back").iterdir())


def registered(uri: str, manifest_sha256: str, version: str = "v1", model: str = "sent") -> Version:
    return Version(
        model=model, name=version, model_id="1", id="2", uri=uri, archived=False, created_ms=0,
        properties={"manifest_sha256": manifest_sha256},
    )  # fmt: skip


def test_an_image_is_served_only_as_the_version_that_was_evaluated(
    tiny_model: Path, tmp_path: Path
) -> None:
    """A writer of the registry of versions names another image, or another version of this one."""
    with ImageRegistry(tmp_path / "registry") as registry:
        make_base_image(f"oci://{registry.host}/base/micro:9.6")
        settings = UploadSettings(
            model_name="sent", target=f"oci://{registry.host}/team",
            base_image=f"{registry.host}/base/micro:9.6",
        )  # fmt: skip
        uris, digests = {}, {}
        for version in ("v1", "v2"):
            uris[version] = str(upload(settings, model=tiny_model, version=version)["uri"])
            back = tmp_path / version
            modelcar.download_image(uris[version], back)
            digests[version] = sha256_file(back / model_files.MANIFEST)
        assert digests["v1"] != digests["v2"]
        check_image(registered(uris["v1"], digests["v1"]))
        check_image(registered(uris["v2"], digests["v2"], "v2"))
        for tampered in (
            registered(uris["v2"], digests["v1"]),  # the other's image
            registered(uris["v2"], digests["v2"]),  # and its digest as well
            registered(uris["v1"], digests["v1"], model="another"),
            registered(uris["v1"], hashlib.sha256(b"").hexdigest()),
        ):
            with pytest.raises(UserError, match="is not what was evaluated"):
                check_image(tampered)
        bare = f"oci://{registry.host}/base/micro:9.6"
        with pytest.raises(UserError, match="no manifest.json"):
            check_image(registered(bare, digests["v1"]))
