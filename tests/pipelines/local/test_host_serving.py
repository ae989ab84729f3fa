"""Local serving through the host's server: the same target, with a token, and a lock that ends."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.local import gateway
from nudge.components.deploy.local.host_serving import HostServing
from nudge.components.deploy.settings import DeploySettings
from nudge.pipelines.local.host_serving import create_app

TOKEN = "a-token"
SETTINGS = DeploySettings()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(tmp_path, TOKEN), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def target(url: str) -> HostServing:
    return HostServing(url, TOKEN, SETTINGS)


def test_what_the_host_serves_is_known(target: HostServing, tmp_path: Path) -> None:
    assert target.live("m") == {}
    shares, servers = {"v1": 60, "v2": 40}, {"v1": "127.0.0.1:1", "v2": "127.0.0.1:2"}
    gateway.switch(tmp_path / "gateway" / "m", gateway.Backends(1, shares, servers))
    assert target.live("m") == shares


def test_what_the_host_says_is_wrong_is_said_here(target: HostServing) -> None:
    with pytest.raises(UserError, match="the server of m v1 has ended; run this again"):
        target.move("m", {"v1": 100})
    version = Version("m", "v1", "1", "2", "/nowhere/at/all", False, 0, {"p": "x"})
    with pytest.raises(UserError, match="/nowhere/at/all"):
        target.bring_up(version)


def test_one_shift_at_a_time_and_a_lock_ends_with_its_holder(url: str, target: HostServing) -> None:
    code = (
        "import sys\n"
        "from nudge.components.deploy.local.host_serving import HostServing\n"
        "from nudge.components.deploy.settings import DeploySettings\n"
        "with HostServing(*sys.argv[1:], DeploySettings()).exclusive('m'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, url, TOKEN]
    entered = threading.Event()

    def enter() -> None:
        with target.exclusive("m"):
            entered.set()

    waiting = threading.Thread(target=enter)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        waiting.start()
        with HostServing(url, TOKEN, SETTINGS).exclusive("another"):
            pass
        assert not entered.wait(1.5)
        holder.kill()
        assert entered.wait(60)
    waiting.join()


def test_nothing_is_done_without_the_token(url: str) -> None:
    assert httpx.post(f"{url}/live", json={"model": "m", "settings": {}}).status_code == 401
    wrong = HostServing(url, "another", SETTINGS)
    with pytest.raises(UserError, match="the bearer token is missing or wrong"):
        wrong.retire("m", set())
    with pytest.raises(UserError, match="401"), wrong.exclusive("m"):
        raise AssertionError("the lock was given")


def test_a_host_that_does_not_answer_is_named() -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9, does not answer .* run that again"):
        HostServing("http://127.0.0.1:9", TOKEN, SETTINGS).live("m")
