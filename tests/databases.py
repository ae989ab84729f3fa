"""PostgreSQL and MariaDB as Debian packages them, on a Unix socket in a folder of their own.

The servers refuse to run as root, so tests that do run them as ``nobody``.
"""

import contextlib
import glob
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NOBODY = 65534
PLACES = ("/usr/lib/postgresql/*/bin", "/usr/sbin", "/usr/libexec")

Query = Callable[[str], subprocess.CompletedProcess[str]]
"""Runs SQL statements; the rows are lines on stdout, the columns separated by a tab."""


def program(name: str, package: str) -> str:
    """The path of a server's program; skips the test if the package is not installed."""
    folders = [*os.environ["PATH"].split(os.pathsep), *(p for g in PLACES for p in glob.glob(g))]
    # The package's own program comes before a wrapper of the same name on the PATH.
    found = shutil.which(name, path=os.pathsep.join(reversed(folders)))
    if found is None:
        pytest.skip(f"{name} is not installed; on Debian: apt-get install {package}")
    return found


@contextlib.contextmanager
def postgresql() -> Iterator[Query]:
    """A PostgreSQL server with the defaults of its package."""
    initdb, server = (program(name, "postgresql") for name in ("initdb", "postgres"))
    with _folder() as folder:
        data = folder / "data"
        _run(initdb, f"--pgdata={data}", "--username=test", "--encoding=UTF8", "--locale=C.UTF-8",
             "--auth=trust", "--no-sync")  # fmt: skip
        options = {"listen_addresses": "", "unix_socket_directories": str(folder), "fsync": "off"}
        settings = [f"--{name}={value}" for name, value in options.items()]
        psql = [program("psql", "postgresql-client"), "--no-psqlrc", "--quiet", "--tuples-only"]
        psql += ["--no-align", "--field-separator=\t", f"--host={folder}", "--username=test"]
        psql += ["--dbname=postgres", "--set=VERBOSITY=verbose", "--set=ON_ERROR_STOP=1"]
        with _running([server, "-D", str(data), *settings], psql, folder) as query:
            yield query


@contextlib.contextmanager
def mariadb() -> Iterator[Query]:
    """A MariaDB server with the defaults of its package."""
    install = program("mariadb-install-db", "mariadb-server")
    server = program("mariadbd", "mariadb-server")
    with _folder() as folder:
        data, socket = folder / "data", folder / "socket"
        plain = ["--no-defaults", f"--datadir={data}"]
        _run(install, *plain, "--auth-root-authentication-method=normal", "--skip-test-db")
        options = ["--skip-networking", f"--socket={socket}", f"--pid-file={folder}/pid"]
        # As /etc/mysql/mariadb.conf.d/50-server.cnf of the package sets it.
        options += ["--character-set-server=utf8mb4", "--collation-server=utf8mb4_general_ci"]
        client = [program("mariadb", "mariadb-client"), "--no-defaults", f"--socket={socket}"]
        client += ["--user=root", "--batch", "--skip-column-names", "--raw"]
        client += ["--default-character-set=utf8mb4"]
        with _running([server, *plain, *options], client, folder) as query:
            query("CREATE DATABASE registry").check_returncode()
            client.append("registry")
            yield query


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="db"))
    if not os.getuid():
        os.chown(folder, NOBODY, NOBODY)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _account() -> dict[str, int]:
    return {} if os.getuid() else {"user": NOBODY, "group": NOBODY}


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", **_account())  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def _running(server: list[str], client: list[str], folder: Path) -> Iterator[Query]:
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(server, stdout=log, stderr=log, cwd="/", **_account())  # type: ignore[call-overload]

    def query(sql: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(client, input=sql, capture_output=True, text=True, timeout=60)

    try:
        end = time.monotonic() + 120
        while query("SELECT 1").returncode:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield query
    finally:
        process.terminate()
        process.wait(60)
