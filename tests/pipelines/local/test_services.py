"""The embedded parts: they come back with their data, and leave nothing running."""

import os
import signal
from pathlib import Path

import boto3
import botocore.exceptions
import psutil
import pytest

from nudge.components.common.core.environment import REGISTRY_TOKEN_PATH
from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from nudge.pipelines.local import parts, services


def client(environment: dict[str, str], secret: str = "") -> object:
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_S3_ENDPOINT"],
        region_name="us-east-1",
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret or environment["AWS_SECRET_ACCESS_KEY"],
    )


def test_killed_parts_come_back_with_their_data_and_down_leaves_no_process(home: Path) -> None:
    environment = services.up(home)
    assert services.up(home) == environment
    client(environment).put_object(Bucket=services.BUCKET, Key="k", Body=b"kept")  # type: ignore[attr-defined]
    before = {record.name: record.pid for record in processes.records(home)}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
    again = services.up(home)
    stored = client(again).get_object(Bucket=services.BUCKET, Key="k")  # type: ignore[attr-defined]
    assert stored["Body"].read() == b"kept"
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        client(again, secret="wrong").list_buckets()  # type: ignore[attr-defined]
    pids = [record.pid for record in processes.records(home)]
    assert not set(pids) & set(before.values())
    services.down(home)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert (home / "services" / "credentials").stat().st_mode & 0o777 == 0o600


def test_a_taken_port_and_a_missing_program_are_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"another program uses port {port} of 127.0.0.1"):
            services.up(home, {services.STORE: port})
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(parts, "_scripts", lambda: "/nowhere")
    with pytest.raises(UserError, match="`weed` is not installed"):
        services.up(home)


def test_another_port_for_a_part_that_runs_is_refused(home: Path) -> None:
    registry = parts.start_registry(home, 0)
    port = int(registry.address.rpartition(":")[2])
    asked = {services.STORE: 0, services.REGISTRY: processes.free_port()}
    with pytest.raises(UserError, match=f"model-registry already runs at {registry.address}"):
        services.up(home, asked)
    assert [record.name for record in processes.records(home)] == [services.REGISTRY]
    parts.check_port(home, services.REGISTRY, port)


def test_only_this_user_reads_the_stores_log(connected: dict[str, str], home: Path) -> None:
    log = home / "services" / "object-store.log"
    assert connected["AWS_ACCESS_KEY_ID"] in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    (record,) = [each for each in processes.records(home) if each.name == services.STORE]
    process = record.process()
    assert process is not None
    assert [each.path for each in process.open_files() if "weed." in each.path] == []


def test_what_is_given_stands_in_the_place_of_a_part(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = {
        "AWS_S3_ENDPOINT": "https://s3.example.com",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_S3_BUCKET": "mine",
    }
    for name in services.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="found no service: set AWS_S3_ENDPOINT, .*REGISTRY_URL"):
        services.from_environment()
    for name in ("AWS_S3_ENDPOINT", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, connection[name])
    with pytest.raises(UserError, match="complete: AWS_SECRET_ACCESS_KEY, AWS_S3_BUCKET not set"):
        services.from_environment()
    for name, value in connection.items():
        monkeypatch.setenv(name, value)
    environment = services.up(home, instead=services.from_environment())
    assert [record.name for record in processes.records(home)] == [services.REGISTRY]
    registry = environment.pop("NUDGE_REGISTRY_URL")
    token = environment.pop(REGISTRY_TOKEN_PATH)
    assert Path(token).stat().st_mode & 0o777 == 0o600
    embedded = {"NUDGE_HOME": str(home), "NUDGE_EMBEDDED": services.REGISTRY}
    assert environment == {**embedded, **connection}
    # A later command finds the same store, as long as the variables are set.
    assert services.env_store(home) == connection
    monkeypatch.setenv("AWS_S3_ENDPOINT", "https://another.example.com")
    assert services.env_store(home) == {}
    monkeypatch.setenv("AWS_S3_ENDPOINT", connection["AWS_S3_ENDPOINT"])
    assert services.not_used({**environment, "NUDGE_REGISTRY_URL": registry}) == []
    own = {**dict.fromkeys(connection, "own"), "NUDGE_REGISTRY_URL": registry}
    assert services.not_used(own) == list(connection)
