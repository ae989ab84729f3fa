"""Servers that outlive their command: which process is still the one that was started."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from nudge.components.common.local import processes
from nudge.pipelines.cli.main import main


def started(home: Path) -> processes.ServiceRecord:
    return processes.start(
        home, "sleeper", ["sleep", "600"], address="", ready=lambda: True, timeout_s=5
    )


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """What psutil sees after the clock was set: it adds the time of the boot to each start."""
    from psutil import _pslinux  # type: ignore[attr-defined]

    real = _pslinux.boot_time()
    monkeypatch.setattr(_pslinux, "boot_time", lambda: real + seconds)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere start times depend on the clock")
def test_a_server_is_the_same_after_the_clock_was_set(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = started(home).pid
    set_clock(monkeypatch, 3600)
    record = processes.read_record(home, "sleeper")
    assert record is not None
    assert record.process() is not None
    processes.stop(home, "sleeper")
    assert not psutil.pid_exists(pid)


def test_a_reused_pid_is_not_mistaken_for_the_server(home: Path) -> None:
    record = started(home)
    time.sleep(0.05)  # some ticks
    other = subprocess.Popen(["sleep", "600"])
    try:
        assert dataclasses.replace(record, pid=other.pid).process() is None
        if sys.platform == "linux":
            _, ticks = str(record.created).split(":")
            boot = dataclasses.replace(record, created=f"another:{ticks}")
            assert boot.process() is None
    finally:
        other.kill()
        other.wait()


def test_the_record_of_an_older_nudge_is_understood(home: Path) -> None:
    record = started(home)
    values: dict[str, Any] = dataclasses.asdict(record)
    path = home / "services" / "sleeper.json"
    for created, same in ((psutil.Process(record.pid).create_time(), True), (1.5e9, False)):
        path.write_text(json.dumps({**values, "created": created}))
        old = processes.read_record(home, "sleeper")
        assert old is not None
        assert (old.process() is not None) is same
    path.write_text(json.dumps(values))


def test_a_name_with_brackets_hides_no_start(tmp_path: Path) -> None:
    program = tmp_path / "a) 1 2 (b"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "600"])
    try:
        deadline = time.monotonic() + 5
        while psutil.Process(child.pid).name() != program.name and time.monotonic() < deadline:
            time.sleep(0.01)
        child_began = processes.created(psutil.Process(child.pid))
        assert child_began != processes.created(psutil.Process(os.getpid()))
        if sys.platform == "linux":
            assert int(str(child_began).split(":")[1]) > 0
    finally:
        child.kill()
        child.wait()
    with pytest.raises(psutil.NoSuchProcess):
        processes.created(psutil.Process(child.pid))


@pytest.mark.parametrize("command", ["run", "services up", "services down"])
@pytest.mark.parametrize("location", ["a file", "/proc"])
def test_a_home_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, command: str
) -> None:
    (tmp_path / "a file").touch()
    home = (tmp_path / location).resolve() / "home"
    monkeypatch.setenv("NUDGE_HOME", str(home))
    ended = CliRunner().invoke(main, command.split())
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"error: {home} cannot hold what nudge keeps (")
    assert "set NUDGE_HOME to a folder that you can write to\n" in ended.stderr


@pytest.mark.parametrize(("command", "status"), [("models", 0), ("promote v1", 2)])
@pytest.mark.parametrize("location", ["a file", "/proc"])
def test_commands_that_only_read_need_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, command: str, status: int
) -> None:
    (tmp_path / "a file").touch()
    home = (tmp_path / location).resolve() / "home"
    monkeypatch.setenv("NUDGE_HOME", str(home))
    ended = CliRunner().invoke(main, command.split())
    assert ended.exit_code == status
    assert f"no models: nothing was run in this folder ({home})" in ended.stderr


def test_an_error_under_a_lock_is_not_mistaken_for_the_locks_own(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the block"), processes.locked(tmp_path, "up"):
        raise OSError("of the block")
