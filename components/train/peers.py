"""Who the ranks of one machine are connected to.

gloo asks for no password: any user of the machine may connect to a rank's port before the real rank
does, and receives and sends in its name, also objects that torch unpickles. The kernel knows the
user at the other end of a connection on the loopback interface.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from nudge.components.common.core.errors import UserError

TABLE = Path("/proc/net/tcp")
"""Linux's table of connections; no other system has one that every user can read."""


@contextlib.contextmanager
def own_peers() -> Iterator[None]:
    """Let the block make connections; raises `UserError` if another user is at the end of one."""
    before = _loopback_connections()
    yield
    owners = _owners()
    for here, there in _loopback_connections() - before:
        owner = owners.get((there, here), os.getuid())
        if owner not in (0, os.getuid()):
            raise UserError(
                f"another user of this machine (uid {owner}) connected to this training as if it "
                "were one of its ranks; nothing was exchanged with it; start the training again, "
                "or set train.processes: 1"
            )


def _loopback_connections() -> set[tuple[int, int]]:
    """The local and the remote port of each connection of this process over 127.0.0.1."""
    return {
        (each.laddr.port, each.raddr.port)
        for each in psutil.Process().net_connections(kind="tcp4")
        if each.status == psutil.CONN_ESTABLISHED and each.raddr.ip == "127.0.0.1"
    }


def _owners() -> dict[tuple[int, int], int]:
    """The uid at each end of a connection, by its own and by its peer's port."""
    found = {}
    for line in TABLE.read_text().splitlines()[1:] if TABLE.is_file() else []:
        _, local, remote, _, _, _, _, uid, *_ = line.split()
        ports = [int(address.rpartition(":")[2], 16) for address in (local, remote)]
        if local.startswith("0100007F") and remote.startswith("0100007F"):
            found[ports[0], ports[1]] = int(uid)
    return found
