"""Who the ranks of one machine are connected to.

gloo asks for no password: any user of the machine may connect to a rank's port before the real rank
does, and receives and sends in its name, also objects that torch unpickles. The kernel knows the
user at the other end of a connection on this machine.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil

from nudge.components.common.core.errors import UserError

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""Linux's tables of connections; no other system has any that every user can read. A client may
connect to an IPv4 port through an IPv6 socket, whose end is then in the second table."""

End = tuple[IPv4Address | IPv6Address, int]
"""An address and a port."""


@contextlib.contextmanager
def own_peers() -> Iterator[None]:
    """Let the block make connections; raises `UserError` if another user is at the end of one, or
    if the other end was closed, so that nobody knows whose it was."""
    if not any(table.is_file() for table in TABLES):
        yield
        return
    before = _connections()
    yield
    made = _connections() - before
    owners = _owners()
    for here, there in made:
        owner = owners.get((there, here))
        is_elsewhere = owner is None and not there[0].is_loopback
        if is_elsewhere or owner in (0, os.getuid()):
            continue
        who = (
            "a process that has ended, of an unknown user,"
            if owner is None
            else f"another user of this machine (uid {owner})"
        )
        raise UserError(
            f"{who} connected to this training as if it were one of its ranks; nothing was "
            "exchanged with it; start the training again, or set train.processes: 1"
        )


def _connections() -> set[tuple[End, End]]:
    """The local and the remote end of each connection of this process, half-closed ones too."""
    return {
        ((_address(each.laddr.ip), each.laddr.port), (_address(each.raddr.ip), each.raddr.port))
        for each in psutil.Process().net_connections(kind="tcp")
        if each.raddr
    }


def _owners() -> dict[tuple[End, End], int]:
    """The uid at each end of a connection, by its own and by its peer's end. A socket that its
    process has closed has no inode, and the table says 0 instead of its uid."""
    found = {}
    for table in TABLES:
        for line in table.read_text().splitlines()[1:] if table.is_file() else []:
            _, local, remote, _, _, _, _, uid, _, inode, *_ = line.split()
            if inode != "0":
                found[_end(local), _end(remote)] = int(uid)
    return found


def _end(text: str) -> End:
    """An end as the tables have it: hexadecimal words in the machine's byte order, and the port."""
    address, _, port = text.rpartition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    return _plain(ip_address(struct.pack(f"={len(words)}I", *words))), int(port, 16)


def _address(text: str) -> IPv4Address | IPv6Address:
    return _plain(ip_address(text))


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 socket writes as ::ffff:127.0.0.1; else the same."""
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address
