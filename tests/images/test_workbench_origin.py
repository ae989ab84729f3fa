"""The workbench's own JupyterLab, started as in the image: no page of another site can use it."""

import http.client
import json
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nudge.components.common.local import processes
from nudge.components.common.local.child_environment import child_environment

ROOT = Path(__file__).parents[2]
PREFIX = "/notebook/some-project/some-bench"
# The dashboard's arguments: the proxy in front checks the login, so the server asks for no token.
ARGUMENTS = (
    f"--ServerApp.token='' --ServerApp.password='' --ServerApp.base_url={PREFIX} "
    # In a container it listens on every address, and so takes any Host.
    "--ServerApp.ip=127.0.0.1 --ServerApp.allow_remote_access=True"
)
HOST, FOREIGN = "bench.apps.example.com", "https://evil.example"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a running workbench with a home of its own."""
    program = Path(sys.executable).with_name("jupyter")
    if not program.with_name("jupyter-lab").exists():
        pytest.skip("JupyterLab is not installed here; install the extra `workbench`")
    home, port = tmp_path_factory.mktemp("bench"), processes.free_port()
    (home / "walk.ipynb").write_text("{}")
    start = runpy.run_path(str(ROOT / "images" / "workbench" / "start.py"))["command"]
    made = {"NOTEBOOK_ARGS": ARGUMENTS, "NB_PREFIX": PREFIX, "NOTEBOOK_ROOT_DIR": str(home)}
    command = start({**made, "NOTEBOOK_PORT": str(port)})
    log = (home / "log").open("w")
    server = subprocess.Popen(
        [str(program), *command[1:], "--allow-root"],  # the image's user is not root
        env={**child_environment(), "HOME": str(home)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while not processes.answers(f"http://127.0.0.1:{port}{PREFIX}/api"):
            assert server.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(30)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def status(port: int, method: str, path: str, body: object = None, **headers: str) -> int:
    """The answer to a request that went through the proxy, which passes the Host header on."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    sent = {"Host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
    content = None if body is None else json.dumps(body)
    connection.request(method, f"{PREFIX}{path}", content, sent)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.mark.long
def test_a_page_of_another_site_cannot_use_the_workbench(port: int) -> None:
    """Neither start code, nor write a file, nor open a socket to a kernel or terminal."""
    for method, path, body in (
        ("POST", "/api/kernels", {"name": "python3"}),
        ("POST", "/api/terminals", {}),
        ("PUT", "/api/contents/x.py", {"type": "file", "format": "text", "content": "x"}),
        ("DELETE", "/api/contents/walk.ipynb", None),
    ):
        assert status(port, method, path, body, Origin=FOREIGN) in (403, 404), (method, path)
    assert status(port, "GET", "/api/events/subscribe", Origin=FOREIGN, **UPGRADE) == 403


@pytest.mark.long
def test_the_workbenchs_own_page_can(port: int) -> None:
    own = f"https://{HOST}"
    file = {"type": "file", "format": "text", "content": "x"}
    with httpx.Client(headers={"Host": HOST}) as page:
        page.get(f"http://127.0.0.1:{port}{PREFIX}/lab").raise_for_status()
        (xsrf,) = [each.value for each in page.cookies.jar if each.name == "_xsrf"]
    token = {"X_XSRFToken": str(xsrf), "Cookie": f"_xsrf={xsrf}"}  # as JupyterLab's page sends
    assert status(port, "PUT", "/api/contents/x.py", file, Origin=own, **token) == 201
    assert status(port, "GET", "/api/events/subscribe", Origin=own, **UPGRADE) == 101
