"""Servers of this machine that outlive the command which started them.

Each has a name and a record, ``<home>/services/<name>.json``: pid and start (so that a pid used
again by another program is never taken for it), address, log. Starting twice is starting once.
"""

import contextlib
import fcntl
import functools
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import tenacity

from nudge.components.common.core.environment import nudge_home as nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.local import service_watch
from nudge.components.common.local.child_environment import OUTER_TMPDIR, child_environment
from nudge.components.common.local.private_home import PRIVATE_UMASK, private_home
from nudge.components.common.local.state_file import Damaged, read_object

STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ServiceRecord:
    """A started server; ``address`` is its URL."""

    name: str
    pid: int
    created: str | float
    """`created` of the process; seconds since the epoch in the record of an older nudge."""
    address: str
    log: str

    def process(self) -> psutil.Process | None:
        """The running process, or None if it is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if isinstance(self.created, str):
                same = created(process) == self.created
            else:
                same = abs(process.create_time() - self.created) < 0.1
            if same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def created(process: psutil.Process) -> str | float:
    """When a process began, which no other one of its pid did.

    On Linux the boot, and the clock ticks from then on: the seconds since the epoch, taken
    elsewhere, change when the clock is set, as it is after a suspend. Raises
    `psutil.NoSuchProcess`.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.is_file():
        return process.create_time()
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(process.pid) from None
    # Field 22 of proc_pid_stat(5); the second is a name that may hold spaces and brackets.
    ticks = int(stat.rpartition(b")")[2].split()[19])
    return f"{boot.read_text().strip()}:{ticks}"


@contextlib.contextmanager
def locked(home: Path, name: str) -> Iterator[None]:
    """Let one process at a time into the block of this name; what comes to need ``home`` begins so.

    Raises `UserError` if nothing can be written there.
    """
    folder = home / "services"
    with contextlib.ExitStack() as stack:
        try:
            private_home(home)
            folder.mkdir(exist_ok=True, mode=0o700)
            file = stack.enter_context((folder / f"{name}.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            what = f"{error.strerror}: {error.filename or name}"
            raise UserError(
                f"{home} cannot hold what nudge keeps ({what}); "
                "set NUDGE_HOME to a folder that you can write to"
            ) from None
        yield


def read_record(home: Path, name: str) -> ServiceRecord | None:
    """The record of a server that was started, whether or not it still runs.

    A damaged record is rebuilt from the running process.
    """
    path = home / "services" / f"{name}.json"
    try:
        values = read_object(path, "")
        record = ServiceRecord(**values)
        fitting = isinstance(record.pid, int) and isinstance(record.created, str | float)
        if fitting and isinstance(record.address, str) and isinstance(record.log, str):
            return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (Damaged, TypeError):
        pass
    return _running(home, name)


def records(home: Path) -> list[ServiceRecord]:
    """Every server that was started below ``home`` and not stopped, even if its record is
    missing."""
    paths = sorted((home / "services").glob("*.json"))
    found = [record for path in paths if (record := read_record(home, path.stem))]
    known = {record.pid for record in found}
    return [*found, *(each for each in _unrecorded(home) if each.pid not in known)]


def _unrecorded(home: Path) -> list[ServiceRecord]:
    """Records of the running servers of a home, made from the processes themselves."""
    found = []
    for each in service_watch.marked(home):
        log = str(home / "services" / f"{each.name}.log")
        with contextlib.suppress(psutil.NoSuchProcess):
            began = created(psutil.Process(each.pid))
            found.append(ServiceRecord(each.name, each.pid, began, each.address, log))
    return found


def _running(home: Path, name: str) -> ServiceRecord | None:
    """The record of a running server, made from its process."""
    return next((each for each in _unrecorded(home) if each.name == name), None)


def _watch(home: Path) -> None:
    """Start the process that stops the services of a home if the home is deleted.

    It exits at once if another one does that already.
    """
    subprocess.Popen(
        [sys.executable, "-P", "-m", service_watch.__name__, str(home)],
        cwd="/",
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def start(
    home: Path,
    name: str,
    command: list[str],
    *,
    address: str,
    ready: Callable[[], bool],
    timeout_s: float,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
    passes: tuple[str, ...] = (),
) -> ServiceRecord:
    """Start a server in a session of its own and wait until it is ready.

    Its variables are those of `child_environment`, with the prefixes ``passes`` and with
    ``environment``; what it writes is private to this user. Raises `UserError` with the end of its
    log if it ends or is not ready in time; it is stopped then.
    """
    log = home / "services" / f"{name}.log"
    for orphan in _unrecorded(home):
        if orphan.name == name:  # its record is gone: two of them would use the same files
            _end(orphan)
    private_home(home)
    log.parent.mkdir(exist_ok=True, mode=0o700)
    log.touch(mode=0o600)
    log.chmod(0o600)
    mark = {
        service_watch.HOME: str(home),
        service_watch.NAME: name,
        service_watch.ADDRESS: address,
    }
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env={**_lasting(child_environment(passes, environment)), **mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=PRIVATE_UMASK,
        )
    record = ServiceRecord(name, child.pid, created(psutil.Process(child.pid)), address, str(log))
    write_atomic(home / "services" / f"{name}.json", json.dumps(asdict(record)))
    _watch(home)
    own = functools.partial(_listens, psutil.Process(child.pid), address)
    if not _waited(lambda: ready() and own(), timeout_s, lambda: child.poll() is not None):
        why = f"ended with status {child.poll()}" if child.poll() is not None else "is not ready"
        stop(home, name)
        raise UserError(f"{name} {why} after at most {timeout_s:g} s; {_tail(log)}")
    return record


def _listens(process: psutil.Process, address: str) -> bool:
    """Whether a process, or one that it started, listens on the port of an address.

    Another user's program may have taken the port in the meantime, and would answer instead.
    """
    port = urlsplit(address).port
    if port is None:  # it is reached in another way
        return True
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in (process, *process.children(recursive=True)):
            for connection in each.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def _lasting(environment: dict[str, str]) -> dict[str, str]:
    """The variables of a server, which outlives the run whose step starts it."""
    outer = environment.pop(OUTER_TMPDIR, None)
    if outer is not None:
        environment.pop("TMPDIR", None)
    return {**environment, "TMPDIR": outer} if outer else environment


def wait_for(record: ServiceRecord, ready: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a server that runs is ready, as one whose starter was killed may not be yet.

    Raises `UserError` with the end of its log; it runs on.
    """
    if not _waited(ready, timeout_s, lambda: record.process() is None):
        raise UserError(
            f"{record.name} runs and does not answer after {timeout_s:g} s; "
            f"{_tail(Path(record.log))}"
        )


class _Ended(tenacity.stop.stop_base):
    """Stop waiting for a server once its process has ended."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self._ended = ended

    def __call__(self, _: tenacity.RetryCallState) -> bool:
        return self._ended()


def _waited(ready: Callable[[], bool], timeout_s: float, ended: Callable[[], bool]) -> bool:
    waiting = tenacity.Retrying(
        stop=tenacity.stop_any(tenacity.stop_after_delay(timeout_s), _Ended(ended)),
        wait=tenacity.wait_fixed(0.1),
        retry=tenacity.retry_if_result(lambda done: not done),
        retry_error_callback=lambda _: False,
    )
    return bool(waiting(ready))


def _tail(log: Path) -> str:
    last = log.read_text(errors="replace").splitlines()[-8:]
    return "\n".join([f"the end of {log}:", *last])


def stop(home: Path, name: str) -> None:
    """End a server and every process that it started; does nothing if it does not run."""
    record = read_record(home, name) or _running(home, name)
    if record is not None:
        _end(record)
    (home / "services" / f"{name}.json").unlink(missing_ok=True)


def _end(record: ServiceRecord) -> None:
    """End a server's process and all that it started."""
    process = record.process()
    if process is not None:
        family = [process, *process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        _, stubborn = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for member in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(stubborn, timeout=STOP_TIMEOUT_S)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def answers(url: str) -> bool:
    """Whether an HTTP GET of this URL is answered with 200; no proxy is asked."""
    import httpx

    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
