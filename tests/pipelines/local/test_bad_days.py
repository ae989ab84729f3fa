"""Bad days: damaged files, a deleted home, a full disk, a proxy, a clock that was set back."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from nudge.components.common.core.environment import bypass_proxy_here
from nudge.components.common.core.errors import UserError
from nudge.components.common.local import guard, processes, service_watch
from nudge.components.deploy.local import gateway
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import parts, services
from nudge.pipelines.local.run import begin
from nudge.pipelines.recipes import load
from tests.conftest import Disk
from tests.pipelines.finished_run import finished_run

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "NULs": lambda content: b"\0" * max(len(content), 8),
    "another version": lambda content: b'{"format": "nudge.other", "version": 99, "more": [1]}\n',
    "missing": lambda content: None,
}
LISTS, MODELS = ("runs", "--json"), ("models", "--json")
READING: dict[str, tuple[tuple[str, ...], ...]] = {
    "runs": (LISTS, ("runs", "show"), ("runs", "compare", "last", "last"), ("logs",)),
    "services": (("services", "status"),),
    "model-registry": (MODELS,),
    "gateway": (("services", "status"), ("clean", "--dry-run")),
    "retention.yaml": (("clean", "--dry-run"),),
}
"""The commands that read the files of a folder of the home; other folders' files get all of
them."""
EVERY = tuple(dict.fromkeys(command for group in READING.values() for command in group))
NOT_OURS = ("object-store", "torchinductor", "checkpoints")
"""Folders of other programs, whose files the commands below do not read."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home as a finished run leaves it: two runs, a registry with a version, tokens, a route."""
    from model_registry import ModelRegistry

    home = tmp_path_factory.mktemp("bad") / "home"
    before = dict(os.environ)
    os.environ["NUDGE_HOME"] = str(home)
    finished_run(home, 1.4, promoted=False)
    run = finished_run(home)
    try:
        url = parts.start_registry(home, 0).address
        os.environ["KF_PIPELINES_SA_TOKEN_PATH"] = str(guard.token_file(home, services.REGISTRY))
        client = ModelRegistry(url, author="test", is_secure=False)
        client.register_model(
            "m", f"s3://nudge/models/m/{run.run_id}", version=run.run_id,
            model_format_name="vLLM", model_format_version="1",
        )  # fmt: skip
        from nudge.components.common.clients.registry.connection import with_registry
        from nudge.components.common.clients.registry.releases import (
            Served,
            find_version,
            note_served,
        )

        version = with_registry(url, find_version("m", run.run_id))
        served = Served("m", "http://127.0.0.1:9", {run.run_id: 100}, (run.run_id,))
        with_registry(url, note_served(version, served, "local", "transformers"))
    finally:
        services.down(home)
        os.environ.clear()
        os.environ.update(before)
    route = gateway.Backends(9, {run.run_id: 100}, {run.run_id: "127.0.0.1:9"})
    gateway.switch(home / "gateway" / "m", route)
    (home / "gateway" / "m" / gateway.CONFIGURATION).write_text('{"admin": {"listen": "unix/a"}}')
    record = processes.ServiceRecord("gateway-m", 2**22, "boot:1", "http://127.0.0.1:9", "x.log")
    (home / "services" / "gateway-m.json").write_text(json.dumps(record.__dict__))
    guard.header_file(home, gateway.TOKEN)
    (home / "retention.yaml").write_text("days: 3\n")
    return home


def files_of(home: Path) -> list[Path]:
    """Every file of nudge's own, found in the home itself; one of each name and folder."""
    found: dict[tuple[str, ...], Path] = {}
    for path in sorted(home.rglob("*")):
        parts_of = path.relative_to(home).parts
        if path.is_file() and not path.is_symlink() and parts_of[0] not in NOT_OURS:
            # One of a hundred slots, and one of the two runs, stands for all.
            kind = tuple("N" if part[:1].isdigit() else part for part in parts_of)
            found[kind] = path
    return list(found.values())


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_file_ends_in_a_traceback(
    damage: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command either does its work or ends with one sentence that says what to do."""
    home = tmp_path / "home"
    shutil.copytree(finished, home, symlinks=True)
    for name in services.VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NUDGE_HOME", str(home))
    files = files_of(home)
    names = {path.name for path in files}
    assert {"result.json", "events.jsonl", "recipe.yaml", "registry.sqlite", "route.json"} <= names
    assert {"model-registry.token", "endpoint.token", "gateway-m.json", "retention.yaml"} <= names
    sentences, recipe = [], load("eiffel")
    for path in files:
        content = path.read_bytes()
        changed = DAMAGES[damage](content)
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        commands = READING.get(path.relative_to(home).parts[0], EVERY)
        for command in (*commands, *([MODELS] if path.name == "model-registry.token" else [])):
            done = CliRunner().invoke(main, command)
            said = f"{path.relative_to(home)} {damage}, nudge {' '.join(command)}: {done.output}"
            assert done.exception is None or isinstance(done.exception, SystemExit), said
            assert "Traceback" not in done.output, said
            if done.exit_code:
                assert done.exit_code == 2, said
                sentences.append((path.name, done.output))
        if path.is_relative_to(home / "runs"):
            begin(recipe, home).lock.close()  # a run can begin
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        for run in list((home / "runs").iterdir()):
            if not (finished / "runs" / run.name).exists():
                shutil.rmtree(run)
    for name, said in sentences:
        assert "error: " in said
        if name in ("registry.sqlite", "retention.yaml"):
            forward = ("delete it", "run `nudge", "move its folder")
            assert any(way in said for way in forward), said


@pytest.mark.parametrize("damage", ["truncated", "empty", "NULs", "another version"])
def test_a_damaged_token_lets_nobody_in_and_says_what_to_do(damage: str, home: Path) -> None:
    path = guard.token_file(home, "endpoint")
    path.write_bytes(DAMAGES[damage](path.read_bytes()[:30]) or b"")
    with pytest.raises(UserError, match="delete it, then run `nudge services down`"):
        guard.read_token(home, "endpoint")
    path.unlink()
    header = guard.header_file(home, "endpoint")
    header.write_bytes(b"\0")
    text = guard.header_file(home, "endpoint").read_text()
    assert text == f"Authorization: Bearer {guard.read_token(home, 'endpoint')}\n"


def test_damaged_keys_are_replaced(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nudge.pipelines.local import object_store

    first = object_store.credentials(home)
    path = home / "services" / "credentials"
    for damage in DAMAGES.values():
        changed = damage(path.read_bytes())
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        keys = object_store.credentials(home)
        assert keys != first
        assert set(keys) == set(first)
        assert path.stat().st_mode & 0o777 == 0o600
        first = keys


@pytest.fixture
def sleeper(home: Path) -> Iterator[Callable[[str], processes.ServiceRecord]]:
    """Starts a service that does nothing."""
    code = "import time\nwhile True: time.sleep(60)"
    pids = []

    def started(name: str) -> processes.ServiceRecord:
        record = processes.start(
            home, name, [sys.executable, "-c", code],
            address="", ready=lambda: True, timeout_s=5,
        )  # fmt: skip
        pids.append(record.pid)
        return record

    yield started
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def gone(pid: int, within_s: float = 30) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_services_stop_by_themselves_once_their_home_is_deleted(
    home: Path, sleeper: Callable[[str], processes.ServiceRecord]
) -> None:
    record = sleeper("a")
    shutil.rmtree(home)
    assert gone(record.pid)


def test_down_finds_services_whose_home_was_deleted_or_whose_record_is_damaged(
    home: Path, sleeper: Callable[[str], processes.ServiceRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_watch", lambda home: None)
    first, second = sleeper("a"), sleeper("b")
    (home / "services" / "a.json").write_bytes(b"\0" * 50)
    (home / "services" / "b.json").unlink()
    assert {each.pid for each in processes.records(home)} == {first.pid, second.pid}
    assert processes.read_record(home, "a") is not None
    shutil.rmtree(home)
    assert sorted(services.down(home)) == ["a", "b"]
    assert gone(first.pid, 5)
    assert gone(second.pid, 5)


def test_a_second_start_ends_a_process_without_a_record(
    home: Path, sleeper: Callable[[str], processes.ServiceRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_watch", lambda home: None)
    first = sleeper("a")
    (home / "services" / "a.json").unlink()
    second = sleeper("a")
    assert gone(first.pid, 5)
    assert [each.pid for each in processes.records(home)] == [second.pid]


def test_the_watcher_leaves_services_with_a_record_and_ends_with_the_last(
    home: Path,
    sleeper: Callable[[str], processes.ServiceRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "_watch", lambda home: None)
    monkeypatch.setattr(service_watch, "POLL_S", 0.01)
    looks = iter(range(20))
    record = sleeper("a")

    def slept(_: float) -> None:
        if next(looks) == 10:
            assert record.process() is not None
            processes.stop(home, "a")

    monkeypatch.setattr(time, "sleep", slept)
    service_watch.watch(home)


def test_a_proxy_in_the_environment_is_not_asked_about_this_machine(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        proxy = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("NO_PROXY", "example.com")
    monkeypatch.setenv("no_proxy", "")
    bypass_proxy_here()
    assert os.environ["NO_PROXY"] == "example.com,127.0.0.1,localhost,::1"
    assert os.environ["no_proxy"] == "127.0.0.1,localhost,::1"
    address = parts.start_registry(home, 0).address
    assert processes.answers(f"{address}/readyz/health")
    token = guard.token_file(home, services.REGISTRY)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    from nudge.components.common.clients.registry.connection import with_registry
    from nudge.components.common.clients.registry.lookup import list_models

    assert with_registry(address, list_models, attempts_s=5) == []


def test_runs_are_in_order_in_one_second_and_after_the_clock_was_set_back(home: Path) -> None:
    later = home / "runs" / "29990101-000059-ffff"
    later.mkdir(parents=True)
    (home / "runs" / "99999999-999999-no-time").mkdir()
    begun = [begin(load("eiffel"), home, fresh=True) for _ in range(4)]
    names = [later.name, *(run.run_id for run in begun)]
    assert names == sorted(names)
    assert begun[0].run_id.startswith("29990101-000100-")
    for run in begun:
        run.lock.close()


def test_a_full_disk_is_a_sentence_with_file_and_space(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = disk.resize(64) / "home"
    monkeypatch.setenv("NUDGE_HOME", str(home))
    home.mkdir()
    (home / "fill").write_bytes(os.urandom(40 << 10))
    with contextlib.suppress(OSError):
        (home / "more").write_bytes(os.urandom(40 << 10))

    def full(*_: object, **__: object) -> None:
        (home / "runs").mkdir()
        (home / "runs" / "x").write_bytes(b"x" * (1 << 20))

    monkeypatch.setattr("nudge.pipelines.cli.run.execute", full)
    done = CliRunner().invoke(main, ["run", "eiffel"])
    assert done.exit_code == 2, done.output
    assert "no space is left on the disk for" in done.stderr
    assert str(home) in done.stderr
    assert "MB are free" in done.stderr
    assert "nudge clean --dry-run" in done.stderr


def test_ctrl_c_while_modules_are_imported_shows_no_traceback() -> None:
    code = """
import os, signal, sys
sys.argv = ["/somewhere/nudge", "runs"]
class Interrupt:
    def find_spec(self, name, *_):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from nudge.pipelines.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_make_clean_stops_the_services_before_it_removes_anything() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(["make", "-n", "clean"], cwd=root, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    (stops,) = [number for number, line in enumerate(lines) if "services down" in line]
    (removes,) = [number for number, line in enumerate(lines) if line.startswith("rm -rf")]
    assert stops < removes
