"""Attacks on a training with several ranks on one machine, by another user of that machine.

torchrun's rendezvous store unpickles what is in it, so whoever writes to it runs code as the user.
"""

import contextlib
import dataclasses
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from nudge.components.train.peers import own_peers
from nudge.components.train.settings import TrainSettings
from nudge.components.train.torchrun import STORE_VARIABLE, run_ranks
from tests.components.train.conftest import SMALL, outputs, write_tokens
from tests.security.other_user import as_other_user, as_root

VALIDATE, SET, GET, MAGIC = 0, 1, 3, 0x3C85F7CE
POISONED = struct.pack("<Q", len(b"poison")) + b"poison"
START = """
import json, sys
from pathlib import Path
from nudge.components.train.settings import TrainSettings
from nudge.components.train.torchrun import run_ranks

settings, paths = json.load(sys.stdin)
run_ranks(2, TrainSettings(**settings), {name: Path(path) for name, path in paths.items()})
"""


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Any]:
    """A training with two ranks that runs until the module's tests have ended."""
    folder = tmp_path_factory.mktemp("ranks")
    tokens = write_tokens(folder / "tokens", tiny_model)
    settings = TrainSettings(base_model=str(tiny_model), **{**SMALL, "max_steps": 1_000_000})
    paths = {"tokens": tokens, **outputs(folder)}
    given = [dataclasses.asdict(settings), {name: str(path) for name, path in paths.items()}]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
    )
    assert process.stdin is not None
    with process.stdin as stdin:
        json.dump(given, stdin)
    try:
        yield psutil.Process(process.pid), folder
    finally:
        own = psutil.Process(process.pid)
        family = [own, *own.children(recursive=True)]
        process.terminate()
        psutil.wait_procs(family, timeout=30)


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Where the processes of a training listen."""
    found = set()
    for each in (process, *process.children(recursive=True)):
        try:
            for connection in each.net_connections(kind="inet"):
                if connection.status == "LISTEN":
                    found.add((connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            continue
    return found


def poison(port: int) -> bytes:
    """Write to a rendezvous store, in the protocol of torch's TCPStore, and read it back."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    key = text(b"/torch.rendezvous.x")
    with socket.create_connection(("127.0.0.1", port), timeout=3) as client:
        client.sendall(struct.pack("<BI", VALIDATE, MAGIC))
        client.sendall(struct.pack("<B", SET) + key + text(b"poison"))
        client.sendall(struct.pack("<B", GET) + key)
        return client.recv(8) + client.recv(6)  # its length, then the value


def test_the_attack_works_on_torchs_own_store() -> None:
    import torch.distributed as dist

    address = ("127.0.0.1", 0)
    store = dist.TCPStore(*address, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    assert poison(store.port) == POISONED
    assert store.get("torch.rendezvous.x") == b"poison"


def test_the_ranks_are_started_without_a_port_to_meet_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str], int]] = []

    class Ranks:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            folder = Path(env[STORE_VARIABLE]).parent
            started.append((command, env, stat.S_IMODE(folder.stat().st_mode)))

        def wait(self) -> int:
            return 0

        def poll(self) -> int:
            return 0

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("nudge.components.train.torchrun.subprocess.Popen", Ranks)
        run_ranks(2, TrainSettings(mode="scratch", model_size="10M"), {"tokens": tmp_path})
    ((command, variables, mode),) = started
    assert "--standalone" not in command
    assert command[command.index("--rdzv-conf") + 1] == "store_type=file"
    meeting = Path(command[command.index("--rdzv-endpoint") + 1])
    assert meeting.parent == Path(variables[STORE_VARIABLE]).parent
    assert mode == 0o700
    assert variables["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_rank_listens_on_the_loopback_interface_only(tmp_path: Path) -> None:
    """And not at a store's port: a single rank, started as torchrun would start it."""
    program = (
        "import json, os, psutil, torch.distributed as dist\n"
        "from nudge.components.train.ranks import _initialize\n"
        f"_initialize('gloo', 1, os.environ['{STORE_VARIABLE}']); dist.new_group(backend='gloo')\n"
        "found = psutil.Process().net_connections(kind='inet')\n"
        "print(json.dumps([[*each.laddr] for each in found if each.status == 'LISTEN']))\n"
        "dist.destroy_process_group()\n"
    )
    variables = {
        **os.environ, STORE_VARIABLE: str(tmp_path / "ranks"), "RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    listening = json.loads(done.stdout)
    assert {address for address, _ in listening} <= {"127.0.0.1"}
    assert int(variables["MASTER_PORT"]) not in {port for _, port in listening}


@as_root
@pytest.mark.long
@pytest.mark.timeout(600)
def test_another_user_writes_to_no_store_of_the_ranks(training: tuple[Any, Path]) -> None:
    process, folder = training
    seen: set[tuple[str, int]] = set()
    deadline = time.monotonic() + 500
    while '"loss"' not in _history(folder) and time.monotonic() < deadline:
        assert process.is_running(), (folder / "log").read_text()
        seen |= listening(process)
        time.sleep(0.05)
    assert '"loss"' in _history(folder), (folder / "log").read_text()
    assert {address for address, _ in seen} == {"127.0.0.1"}
    answers = {port: as_other_user(poison, port) for _, port in seen}
    assert POISONED not in answers.values(), answers


def _history(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("metrics.jsonl"))


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def through_ipv6(port: int) -> socket.socket:
    client = socket.socket(socket.AF_INET6)
    client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    client.settimeout(5)
    client.connect(("::ffff:127.0.0.1", port))
    return client


def from_another_loopback_address(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5, source_address=("127.0.0.2", 0))


def half_closed(port: int) -> socket.socket:
    """A peer that has sent everything already."""
    client = connect(port)
    client.shutdown(socket.SHUT_WR)
    return client


def connect_and_stay(way: Callable[[int], socket.socket], port: int) -> str:
    """Connect, and keep the connection until the other side ends it."""
    with way(port) as client:
        return client.recv(1).hex() or "ended"


def test_own_peers_are_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with contextlib.ExitStack() as stack, own_peers():
            stack.enter_context(connect(port))
            stack.enter_context(through_ipv6(port))
            for _ in range(2):
                stack.enter_context(listener.accept()[0])


def test_a_peer_that_has_gone_is_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        contextlib.ExitStack() as stack,
        pytest.raises(UserError, match=r"a process that has ended, of an unknown user"),
        own_peers(),
    ):
        connect(listener.getsockname()[1]).close()
        stack.enter_context(listener.accept()[0])


@as_root
@pytest.mark.parametrize("way", [connect, through_ipv6, from_another_loopback_address, half_closed])
def test_a_peer_of_another_user_is_noticed(way: Callable[[int], socket.socket]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        other = pool.submit(as_other_user, connect_and_stay, way, listener.getsockname()[1])
        with (
            pytest.raises(UserError, match=r"another user .*uid 65534"),
            contextlib.ExitStack() as stack,
            own_peers(),
        ):
            stack.enter_context(listener.accept()[0])
        assert other.result() == "ended"
