"""Attacks on the services on a laptop: by another user of the machine, and by a web page.

The home here is in a folder that everybody can reach: only what nudge does itself protects it.
"""

import http.client
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from aiohttp import web

from nudge.components.common.core.environment import REGISTRY_TOKEN_PATH
from nudge.components.common.core.errors import UserError
from nudge.components.common.local import guard, processes
from nudge.components.deploy.local import gateway
from nudge.pipelines.local import object_store, parts, services, talking
from tests.local_registry import endpoint_headers
from tests.security.other_user import as_other_user, as_root
from tests.web_server import Server

EVIL_PAGE = {"Origin": "https://evil.example", "Host": "evil.example"}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
SETTINGS_FRAME = 4


@pytest.fixture(scope="module")
def home(open_folder: Path) -> Iterator[Path]:
    folder = open_folder / "home"
    yield folder
    services.down(folder)


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    return services.up(home)


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    async def complete(_: web.Request) -> web.Response:
        return web.json_response({"choices": [{"text": "secret"}]})

    with Server(("POST", "/v1/completions", complete), ("GET", "/health", complete)) as server:
        yield server.url.removeprefix("http://")


@pytest.fixture(scope="module")
def endpoint(home: Path, upstream: str) -> str:
    return gateway.route(home, "m", {"v1": upstream}, {"v1": 100}, 0)


def process_of(home: Path, name: str) -> psutil.Process:
    record = processes.read_record(home, name)
    process = record.process() if record else None
    assert process is not None
    return process


def ports_of(process: psutil.Process) -> list[int]:
    found = process.net_connections(kind="inet")
    assert all(each.laddr.ip == "127.0.0.1" for each in found if each.status == "LISTEN")
    return sorted({each.laddr.port for each in found if each.status == "LISTEN"})


def sockets_of(process: psutil.Process) -> list[str]:
    """The paths of the Unix sockets that a process listens on."""
    listening = {
        int(fields[6]): fields[7]
        for fields in (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
        if len(fields) > 7 and int(fields[3], 16) & 0x10000
    }
    own = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        name = os.readlink(link)
        if name.startswith("socket:["):
            own.add(int(name[8:-1]))
    paths = [path for inode, path in listening.items() if inode in own]
    return [path if path.startswith("/") else str(Path(process.cwd()) / path) for path in paths]


def connect_unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    return "connected"


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        data = body.encode() if isinstance(body, str) else body
        if data is not None:
            connection.putheader("Content-Length", str(len(data)))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(data)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (http.client.HTTPException, ConnectionError):
        return 0
    finally:
        connection.close()


@as_root
def test_another_user_reaches_no_admin_api_of_caddy(home: Path, endpoint: str) -> None:
    process = process_of(home, "gateway-m")
    public = int(endpoint.rpartition(":")[2])
    config = '{"apps": {"http": {"servers": {}}}}'
    kind = {"Content_Type": "application/json"}
    answers = {
        port: as_other_user(lambda port=port: ask(port, "POST", "/load", config, **kind))
        for port in ports_of(process)
    }
    assert answers == {public: 401}
    sockets = sockets_of(process)
    assert len(sockets) == 1
    assert as_other_user(connect_unix, sockets[0]) == "PermissionError"
    assert connect_unix(sockets[0]) == "connected"  # what it is refused to is there
    # The socket is private by its own mode as well as by its folder's.
    assert stat.S_IMODE(os.stat(sockets[0]).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(Path(sockets[0]).parent).st_mode) == 0o700


@as_root
def test_another_user_reads_nothing_of_a_home(home: Path, endpoint: str) -> None:
    (home / "reuse").mkdir(exist_ok=True)
    for path in (home, home / "services", home / "gateway", home / "reuse"):
        assert as_other_user(os.listdir, path) == "PermissionError", path
    assert as_other_user((home / "gateway" / "m" / "caddy.json").read_text) == "PermissionError"


def test_a_program_that_takes_a_servers_port_is_not_taken_for_it(tmp_path: Path) -> None:
    """It answers as the server would, and would get the token."""

    async def fine(_: web.Request) -> web.Response:
        return web.Response()

    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with Server(("GET", "/health", fine)) as thief:
        health = f"{thief.url}/health"
        with pytest.raises(UserError, match="server is not ready"):
            processes.start(
                tmp_path / "home", "server", command, address=thief.url,
                ready=lambda: processes.answers(health), timeout_s=3,
            )  # fmt: skip


def test_the_token_of_an_endpoint_goes_to_this_homes_own_server_only(
    home: Path, endpoint: str, tmp_path: Path
) -> None:
    """Whatever the registry names, and whoever has the port of a server that has ended."""
    assert talking.served(home, "m", endpoint).token == guard.read_token(home, gateway.TOKEN)
    port = int(endpoint.rpartition(":")[2])
    for url in (f"{endpoint}@evil.example", f"http://127.0.0.1:{port + 1}", "https://evil.example"):
        assert talking.served(home, "m", url).token == ""
    ended = tmp_path / "home"
    shutil.copytree(
        home / "gateway" / "m",
        ended / "gateway" / "m",
        symlinks=True,
        ignore=shutil.ignore_patterns("*.sock"),
    )
    with pytest.raises(UserError, match="its server has ended"):
        talking.served(ended, "m", endpoint)


def form(name: str) -> tuple[bytes, dict[str, str]]:
    """A file upload as a web page's form sends it without asking the server first."""
    body = (
        f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\npoison\r\n--x--\r\n"
    ).encode()
    return body, {"Content_Type": "multipart/form-data; boundary=x", **EVIL_PAGE}


def attack(port: int) -> list[str]:
    """What an uninvited client gets from a port of the store, of all that it may not."""
    body, headers = form("weights")
    local = {**headers, "Host": f"127.0.0.1:{port}"}
    got = []
    for method, path, content, given in (
        ("POST", "/buckets/nudge/models/weights", body, headers),
        ("POST", "/buckets/nudge/models/weights", body, local),
        ("POST", "/nudge/models/weights", body, headers),
        ("PUT", "/nudge/models/weights", b"poison", EVIL_PAGE),
        ("GET", "/buckets/nudge/models/weights", None, {}),
        ("GET", "/nudge/models/weights", None, {}),
        ("GET", "/dir/assign", None, EVIL_PAGE),
        ("GET", "/dir/status", None, {}),
        ("GET", "/vol/status", None, {}),
        ("GET", "/?pretty=y", None, EVIL_PAGE),
        ("DELETE", "/buckets/nudge/models/weights", None, {}),
        ("DELETE", "/nudge/models/weights", None, {}),
    ):
        status = ask(port, method, path, content, **given)
        if status not in (0, 400, 403, 405):
            got.append(f"{port} {method} {path}: {status}")
    with socket.create_connection(("127.0.0.1", port), timeout=3) as client:
        client.sendall(PREFACE)  # as a gRPC client without TLS does
        try:
            answer = client.recv(9)
        except OSError:
            answer = b""
        if len(answer) == 9 and answer[3] == SETTINGS_FRAME:
            got.append(f"{port}: gRPC without TLS")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=3) as plain,
            context.wrap_socket(plain) as client,
        ):
            client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            if client.recv(1):
                got.append(f"{port}: TLS without a certificate")
    except OSError:
        pass
    return got


@as_root
def test_another_user_and_a_web_page_get_nothing_from_any_port_of_the_store(
    home: Path, environment: dict[str, str]
) -> None:
    client = object_store.client(environment)
    client.put_object(Bucket="nudge", Key="models/weights", Body=b"approved")
    process = process_of(home, services.STORE)
    ports = ports_of(process)
    assert len(ports) == len(parts.STORE_PORTS)
    assert [as_other_user(attack, port) for port in ports] == [[] for _ in ports]
    stored = client.get_object(Bucket="nudge", Key="models/weights")["Body"].read()
    assert stored == b"approved"
    sockets = sockets_of(process)
    assert sockets
    for path in sockets:
        assert as_other_user(connect_unix, path) == "PermissionError", path
    answer = httpx.get(
        environment["AWS_S3_ENDPOINT"] + "/nudge", headers={"Origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in answer.headers


def test_only_this_user_reads_the_certificates_of_the_store(
    home: Path, environment: dict[str, str]
) -> None:
    files = list((home / "services" / "object-store.security").glob("*.*"))
    private = [path for path in files if path.suffix in (".pem", ".toml")]
    assert {path.name for path in private} == {"ca.pem", "cert.pem", "key.pem", "security.toml"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


REGISTRY_PATH = "/api/model_registry/v1alpha3/registered_models"


@as_root
def test_another_user_gets_nothing_from_registry_and_endpoint(
    environment: dict[str, str], endpoint: str
) -> None:
    registry = int(environment["NUDGE_REGISTRY_URL"].rpartition(":")[2])
    served = int(endpoint.rpartition(":")[2])
    data = json.dumps({"name": "poison"})
    kind = {"Content_Type": "application/json"}
    for port, path in ((registry, REGISTRY_PATH), (served, "/v1/completions")):
        assert as_other_user(lambda p=port, q=path: ask(p, "POST", q, data, **kind)) == 401
        wrong = {**kind, "Authorization": "Bearer wrong"}
        assert as_other_user(lambda p=port, q=path, w=wrong: ask(p, "POST", q, data, **w)) == 401
        assert as_other_user(lambda p=port, q=path: ask(p, "GET", q)) == 401
    assert ask(registry, "GET", "/docs") == 401
    assert ask(served, "GET", "/v1/models") == 401
    assert (ask(registry, "GET", "/readyz/health"), ask(served, "GET", "/health")) == (200, 200)


def test_a_web_page_gets_nothing_even_with_the_token(
    home: Path, environment: dict[str, str], endpoint: str
) -> None:
    """Neither by a host name that resolves to 127.0.0.1, nor by a form."""
    token = Path(environment[REGISTRY_TOKEN_PATH]).read_text()
    registry = {"Authorization": f"Bearer {token}"}
    for url, path, headers in (
        (environment["NUDGE_REGISTRY_URL"], REGISTRY_PATH, registry),
        (endpoint, "/v1/completions", endpoint_headers(home)),
    ):
        port = int(url.rpartition(":")[2])
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
            foreign = {**headers, "Host": host, "Content_Type": "application/json"}
            assert ask(port, "POST", path, '{"name": "x"}', **foreign) in (400, 421), host
        for kind in (
            "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"
        ):  # fmt: skip
            given = {**headers, "Content_Type": kind}
            assert ask(port, "POST", path, '{"name": "x"}', **given) == 415, kind
        assert ask(port, "POST", path, '{"name": "x"}', **headers) == 415
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
            own = {**headers, "Host": host, "Content_Type": "application/json; charset=utf-8"}
            assert ask(port, "POST", path, json.dumps({"name": host}), **own) in (200, 201), host


def test_the_unmodified_client_and_curl_pass_the_token(
    home: Path, environment: dict[str, str], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_registry import ModelRegistry

    monkeypatch.setenv(REGISTRY_TOKEN_PATH, environment[REGISTRY_TOKEN_PATH])
    client = ModelRegistry(environment["NUDGE_REGISTRY_URL"], author="t", is_secure=False)
    client.register_model(
        "by-client", "s3://b/m", version="v1", model_format_name="x", model_format_version="1"
    )
    assert client.get_model_version("by-client", "v1").name == "v1"
    header = guard.header_file(home, gateway.TOKEN)
    assert stat.S_IMODE(header.stat().st_mode) == 0o600
    command = ["curl", "-s", f"{endpoint}/v1/completions", "-H", "Content-Type: application/json"]
    command += ["-H", f"@{header}", "-d", "{}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["text"] == "secret"
    assert guard.read_token(home, gateway.TOKEN) not in " ".join(command)


CANARY = "canary-8f2b"


def test_a_server_gets_only_the_variables_that_it_needs(
    tmp_path: Path, upstream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    for name in ("DATABASE_PASSWORD", "HF_TOKEN", "AWS_SESSION_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    try:
        secret = services.up(home)["AWS_SECRET_ACCESS_KEY"]
        gateway.route(home, "m", {"v1": upstream}, {"v1": 100}, 0)
        for name in (services.STORE, services.REGISTRY, "gateway-m"):
            given = process_of(home, name).environ()
            assert CANARY not in given.values(), name
            assert (secret in given.values()) == (name == services.STORE)
            assert given["PATH"] == os.environ["PATH"]
            assert not any(secret in word for word in process_of(home, name).cmdline())
    finally:
        services.down(home)


def test_the_server_of_a_model_asks_for_the_token_and_runs_no_code_of_its_folder(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The model is called `click`, as a module that the server imports is."""
    from nudge.components.deploy.local.local_serving import LocalServing
    from nudge.components.deploy.settings import DeploySettings

    home, folder, canary = tmp_path / "home", tmp_path / "served", tmp_path / "ran"
    shutil.copytree(tiny_model, folder / "click")
    (folder / "click" / "__init__.py").write_text(f"open({str(canary)!r}, 'a').write('x')\n")
    try:
        with processes.locked(home, "up"):
            pass
        record = LocalServing(home, DeploySettings())._serve(folder, "click", "v1")
        port = int(record.address.rpartition(":")[2])
        body = json.dumps({"model": "click", "prompt": "Paris", "max_tokens": 1})
        kind = {"Content_Type": "application/json"}
        assert ask(port, "POST", "/v1/completions", body, **kind) == 401
        given = {**kind, **endpoint_headers(home)}
        assert ask(port, "POST", "/v1/completions", body, **given) == 200
        given["Host"] = "evil.example"
        assert ask(port, "POST", "/v1/completions", body, **given) == 421
        assert not canary.exists()
    finally:
        services.down(home)
