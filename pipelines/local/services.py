"""The embedded services of a laptop: object store and model registry.

They replace the S3 data connection and the Model Registry of a cluster, and are reached in the same
way: through the AWS_* variables and a registry URL. `nudge.pipelines.local.serving` has the models.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from nudge.components.common.core.environment import (
    CONNECTION,
    EMBEDDED,
    HOME,
    REGISTRY_TOKEN_PATH,
    REGISTRY_URL,
    S3_BUCKET,
    S3_ENDPOINT,
    S3_REGION,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.local import guard, processes
from nudge.pipelines.local import object_store, parts
from nudge.pipelines.local.object_store import BUCKET as BUCKET
from nudge.pipelines.local.parts import REGISTRY as REGISTRY
from nudge.pipelines.local.parts import STORE as STORE
from nudge.pipelines.local.registry.copy import check

VARIABLES = (*CONNECTION, REGISTRY_URL)
"""The variables that may name a store and a registry to use instead of the embedded ones."""
ENV_STORE = "given-store"
"""The file with the URL of the store from the environment that the last run used together with the
embedded registry."""


class NothingRun(UserError):
    """No service was ever started in this home."""


def up(
    home: Path, ports: Mapping[str, int] | None = None, instead: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Start what is not running; returns the variables through which steps reach the services.

    ``ports`` requests fixed ports, by ``object-store`` and ``model-registry``; ``instead`` is the
    result of `from_environment`. Raises `UserError` if a service or a requested port is not
    available.
    """
    ports, instead = ports or {}, instead or {}
    with processes.locked(home, "up"):
        for name, port in ports.items():
            parts.check_port(home, name, port)
        embedded = [
            name
            for name, variable in ((STORE, S3_ENDPOINT), (REGISTRY, REGISTRY_URL))
            if variable not in instead
        ]
        _note_env_store(home, instead)
        environment = {HOME: str(home), EMBEDDED: ",".join(embedded), **instead}
        if S3_ENDPOINT not in instead:
            _stop_unprotected(home, STORE, parts.store_security_folder(home))
            _stop_with_other_keys(home)
            store = parts.running(home, STORE) or parts.start_store(home, ports.get(STORE, 0))
            environment |= {
                **object_store.credentials(home),
                S3_ENDPOINT: store.address,
                S3_REGION: "us-east-1",
                S3_BUCKET: BUCKET,
            }
            object_store.make_bucket(environment)
        if REGISTRY_URL not in instead:
            _stop_unprotected(home, REGISTRY, home / "services" / f"{REGISTRY}.token")
            registry = parts.running(home, REGISTRY)
            registry = registry or parts.start_registry(home, ports.get(REGISTRY, 0))
            environment |= {REGISTRY_URL: registry.address, **_registry_token(home)}
    return environment


def _stop_unprotected(home: Path, name: str, protection: Path) -> None:
    """Stop a service that an older nudge started without its current protection."""
    if parts.running(home, name) and not protection.exists():
        processes.stop(home, name)


def _stop_with_other_keys(home: Path) -> None:
    """Stop a store that does not take the keys of its file, which was deleted or damaged."""
    store = parts.running(home, STORE)
    if store is None:
        return
    environment = {**object_store.credentials(home), S3_ENDPOINT: store.address}
    if object_store.refuses(environment):
        processes.stop(home, STORE)


def _registry_token(home: Path) -> dict[str, str]:
    return {REGISTRY_TOKEN_PATH: str(guard.token_file(home, REGISTRY))}


def from_environment() -> dict[str, str]:
    """The variables of this process that name services to use instead of embedded ones: a data
    connection, a registry, or both.

    Raises `UserError` if they name neither, or only part of a data connection.
    """
    values = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not values:
        raise UserError(
            f"--use-env-services found no service: set {', '.join(CONNECTION)}, or {REGISTRY_URL}"
        )
    missing = [name for name in CONNECTION if name not in values]
    if missing and len(missing) < len(CONNECTION):
        raise UserError(
            f"the data connection is incomplete: {', '.join(missing)} not set; set it, or unset the"
            " others to use the object store of this machine"
        )
    return values


def not_used(environment: Mapping[str, str]) -> list[str]:
    """The variables of this process that differ from those of the services in use."""
    return [name for name in VARIABLES if os.environ.get(name, "") not in ("", environment[name])]


def env_store(home: Path) -> dict[str, str]:
    """The data connection in the environment, if the last run used it with the embedded registry.

    Its credentials are not kept, so a later command can use it only while the variables are set.
    """
    note = home / ENV_STORE
    endpoint = os.environ.get(S3_ENDPOINT)
    if not endpoint or not note.is_file() or note.read_bytes() != endpoint.encode():
        return {}
    return {name: os.environ[name] for name in CONNECTION if os.environ.get(name)}


def _note_env_store(home: Path, instead: Mapping[str, str]) -> None:
    note = home / ENV_STORE
    if S3_ENDPOINT in instead and REGISTRY_URL not in instead:
        note.write_text(instead[S3_ENDPOINT], encoding="utf-8")
    elif S3_ENDPOINT not in instead:
        note.unlink(missing_ok=True)


def has_store(home: Path) -> bool:
    """Whether an object store was ever started in this home."""
    return (home / STORE).is_dir()


def resting(home: Path) -> list[str]:
    """The names of the services that `up` would start."""
    return [name for name in (STORE, REGISTRY) if not parts.running(home, name)]


@contextlib.contextmanager
def registry_to_read(home: Path) -> Iterator[str]:
    """The URL of the running registry, or of a temporary one for the same file: a thread of this
    process that ends with the block, so that no other process comes to rely on it.

    Its token is in this process's variables during the block. Raises `NothingRun` if this home has
    no registry.
    """
    database = parts.database(home)
    running = parts.running(home, REGISTRY)
    if running:
        with _variables(_registry_token(home)):
            yield running.address
        return
    check(database)
    if not database.is_file():
        raise NothingRun(f"no models: nothing was run in this folder ({home})")
    import uvicorn

    from nudge.pipelines.local.registry.app import create_app

    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = guard.Guard(create_app(database), guard.read_token(home, REGISTRY))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            with _variables(_registry_token(home)):
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def down(home: Path) -> list[str]:
    """Stop every service and every served model; returns the names of those that were running."""
    with processes.locked(home, "up"):
        stopped = []
        for record in reversed(processes.records(home)):
            if record.process() is not None:
                stopped.append(record.name)
            processes.stop(home, record.name)
    return stopped


def status(home: Path) -> list[dict[str, Any]]:
    """One row per service: name, state, address, pid, resident_mb (of all its processes), log.

    The address is the one for users: for a gateway the model's, not Caddy's administration port.
    """
    from nudge.components.deploy.local import gateway

    public = gateway.addresses(home)
    rows: list[dict[str, Any]] = []
    for record in processes.records(home):
        process = record.process()
        resident = 0
        if process is not None:
            for member in (process, *process.children(recursive=True)):
                try:
                    resident += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
        rows.append(
            {
                "name": record.name,
                "state": "running" if process else "stopped",
                "address": public.get(record.name, record.address),
                "pid": record.pid if process else None,
                "resident_mb": round(resident / 1e6) if process else None,
                "log": record.log,
            }
        )
    return rows
