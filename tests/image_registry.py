"""A real registry of images on 127.0.0.1, for tests: Debian's docker-registry, or none at all.

    with ImageRegistry(folder) as registry:              # anybody may do anything
    with ImageRegistry(folder, access="basic") as ...    # USER and PASSWORD, as htpasswd
    with ImageRegistry(folder, access="token") as ...    # the same, for a token of one repository

Where the program cannot be had, the test that asks for it is skipped, and says so.
"""

import base64
import datetime
import functools
import gzip
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from nudge.components.common.clients import image_registry
from nudge.components.common.clients.image_reference import parse_reference
from nudge.components.common.local import processes

USER, PASSWORD = "tester", "the-pass:word"
HTPASSWD = f"{USER}:$2y$04$abcdefghijklmnopqrstuuDXI/cl1OMgyOrYGuFse7IqrZ7hYFGsm\n"
"""PASSWORD as bcrypt has it."""
PACKAGE = "docker-registry"


@functools.cache
def program() -> str:
    """The registry's program: of this system, or out of Debian's package; skips without one."""
    if found := shutil.which(PACKAGE):
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip(f"no program {PACKAGE} here, and no apt-get to bring it")
    folder = Path(tempfile.mkdtemp(prefix="nudge-image-registry-"))
    problem = ""
    for command in (["true"], ["apt-get", "-qq", "update"]):
        subprocess.run(command, capture_output=True, timeout=120)
        download = subprocess.run(
            ["apt-get", "-qq", "download", PACKAGE],
            cwd=folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        problem = download.stderr.strip()
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, timeout=120)
            return str(folder / "usr" / "bin" / PACKAGE)
    pytest.skip(f"Debian's {PACKAGE} cannot be downloaded: {problem}")


class ImageRegistry:
    """The registry from ``with`` to its end; ``host`` is 127.0.0.1 and its port."""

    def __init__(self, folder: Path, access: Literal["open", "basic", "token"] = "open") -> None:
        self.folder, self._access = folder, access
        self.host = f"127.0.0.1:{processes.free_port()}"
        self._tokens = TokenServer(folder) if access == "token" else None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._tokens:
            self._tokens.start()
        path = self.folder / "config.yml"
        path.write_text(yaml.safe_dump(self._configuration()))
        self._log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            [program(), "serve", str(path)], stdout=self._log, stderr=self._log
        )
        deadline = time.monotonic() + 60
        while not self._listens():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        if self._tokens:
            self._tokens.stop()

    def pull_secret(self, path: Path, password: str = PASSWORD, host: str = "") -> Path:
        """Write what `podman login` would; returns the path."""
        auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
        path.write_text(json.dumps({"auths": {host or self.host: {"auth": auth}}}))
        return path

    def blob(self, digest: str) -> Path:
        """Where the registry keeps a blob."""
        sha256 = digest.removeprefix("sha256:")
        below = self.folder / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
        return below / sha256[:2] / sha256 / "data"

    def _listens(self) -> bool:
        import httpx

        try:
            return httpx.get(f"http://{self.host}/v2/").status_code in (200, 401)
        except httpx.HTTPError:
            return False

    def _configuration(self) -> dict[str, Any]:
        auth: dict[str, Any] = {}
        if self._access == "basic":
            users = self.folder / "htpasswd"
            users.write_text(HTPASSWD)
            auth = {"auth": {"htpasswd": {"realm": "tests", "path": str(users)}}}
        elif self._tokens:
            auth = {"auth": {"token": self._tokens.configuration()}}
        return {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {
                "filesystem": {"rootdirectory": str(self.folder / "data")},
                "delete": {"enabled": True},
            },
            "http": {"addr": self.host, "secret": "only-for-a-test"},
            **auth,
        }


class TokenServer:
    """Gives USER a token for what was asked, as quay.io and docker.io do before their registries.

    https://distribution.github.io/distribution/spec/auth/jwt/
    """

    SERVICE, ISSUER = "registry-of-a-test", "tokens-of-a-test"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.given: list[str] = []

    def start(self) -> None:
        import trustme
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        authority = trustme.CA(key_type=trustme.KeyType.RSA)
        certificate = authority.issue_cert("tokens", key_type=trustme.KeyType.RSA)
        pem = certificate.cert_chain_pems[0].bytes()
        self._certificate = self._folder / "tokens.pem"
        authority.cert_pem.write_to_path(self._certificate)
        self._x5c = "".join(pem.decode().split("-----")[2].split())
        self._key: Any = load_pem_private_key(certificate.private_key_pem.bytes(), None)
        outer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = parse_qs(urlsplit(self.path).query)
                pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                allowed = self.headers.get("authorization") == f"Basic {pair}"
                scopes = asked.get("scope", [])
                body = json.dumps({"token": outer._token(scopes)} if allowed else {}).encode()
                self.send_response(200 if allowed else 401)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def configuration(self) -> dict[str, str]:
        return {
            "realm": f"http://127.0.0.1:{self._server.server_port}/token",
            "service": self.SERVICE,
            "issuer": self.ISSUER,
            "rootcertbundle": str(self._certificate),
        }

    def _token(self, scopes: list[str]) -> str:
        from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
        from cryptography.hazmat.primitives.hashes import SHA256

        now = int(datetime.datetime.now(datetime.UTC).timestamp())
        access = [
            {"type": kind, "name": name, "actions": actions.split(",")}
            for kind, name, actions in (scope.split(":") for scope in scopes)
        ]
        claims = {
            "iss": self.ISSUER, "sub": USER, "aud": self.SERVICE, "exp": now + 300,
            "nbf": now - 10, "iat": now, "jti": uuid.uuid4().hex, "access": access,
        }  # fmt: skip
        head = {"typ": "JWT", "alg": "RS256", "x5c": [self._x5c]}
        signed = ".".join(_url64(json.dumps(part).encode()) for part in (head, claims))
        signature = self._key.sign(signed.encode(), PKCS1v15(), SHA256())
        token = f"{signed}.{_url64(signature)}"
        self.given.append(token)
        return token


def make_base_image(uri: str, machines: tuple[str, ...] = ("amd64", "arm64")) -> None:
    """Push a base image as small as can be, for these machines; a packed layer, as they have."""
    reference = parse_reference(uri)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as packed:
        entry = tarfile.TarInfo("bin/sh")
        entry.size, entry.mode = 4, 0o755
        packed.addfile(entry, io.BytesIO(b"#!sh"))
    layer = gzip.compress(archive.getvalue(), mtime=0)
    with image_registry.repository(reference) as target:

        def put(body: bytes) -> str:
            digest = image_registry.digest_of(body)
            target.put_blob(digest, len(body), lambda: iter([body]))
            return digest

        entries = []
        for machine in machines:
            config = {
                "os": "linux", "architecture": machine, "config": {"Cmd": ["sh"]},
                "rootfs": {
                    "type": "layers",
                    "diff_ids": [image_registry.digest_of(archive.getvalue())],
                },
                "history": [{"created_by": "a test"}],
            }  # fmt: skip
            body = json.dumps(config).encode()
            parts = {
                "config": (image_registry.CONFIG, body),
                "layer": (f"{image_registry.LAYER}+gzip", layer),
            }
            described = {
                name: {"mediaType": media, "digest": put(part), "size": len(part)}
                for name, (media, part) in parts.items()
            }
            manifest = json.dumps(
                {
                    "schemaVersion": 2, "mediaType": image_registry.MANIFEST,
                    "config": described["config"], "layers": [described["layer"]],
                }
            ).encode()  # fmt: skip
            digest = image_registry.digest_of(manifest)
            target.put_manifest(digest, manifest, image_registry.MANIFEST)
            platform = {"os": "linux", "architecture": machine}
            entries.append(
                {
                    "mediaType": image_registry.MANIFEST, "digest": digest, "size": len(manifest),
                    "platform": platform,
                }
            )  # fmt: skip
        index = {"schemaVersion": 2, "mediaType": image_registry.INDEX, "manifests": entries}
        target.put_manifest(reference.tag, json.dumps(index).encode(), image_registry.INDEX)


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
