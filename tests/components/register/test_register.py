"""Registering: once per run, over TLS as on a cluster, and finished after an outage."""

import json
import shlex
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import CliRunner

from nudge.components.common.artifacts.comparison import RECORD
from nudge.components.common.clients.registry import connection
from nudge.components.common.clients.registry.connection import Unreachable, with_registry
from nudge.components.common.clients.registry.releases import (
    Served,
    find_served,
    find_version,
    list_versions,
    note_served,
)
from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.common.local import processes
from nudge.components.deploy.local.local_serving import LocalServing
from nudge.components.deploy.settings import DeploySettings
from nudge.components.register.register import register
from nudge.components.register.settings import RegisterSettings
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import services
from tests.faulty_proxy import FaultyProxy
from tests.image_registry import ImageRegistry, make_base_image
from tests.objects import list_keys

Release = Callable[..., dict[str, Any]]


@pytest.fixture
def release(environment: dict[str, str], model: Path, evaluation: Path) -> Release:
    """Upload and register the model as a version of ``name``, in a run named after the version."""

    def release(name: str, version: str, run: str = "", **settings: Any) -> dict[str, Any]:
        uri = upload(UploadSettings(model_name=name), model=model, version=version)["uri"]
        given = RegisterSettings(model_name=name, **settings)
        return register(
            given, uri=uri, version=version, run_id=run or version, model=model,
            evaluation=evaluation,
        )  # fmt: skip

    return release


def test_the_incumbent_of_a_version_is_registered(
    release: Release, environment: dict[str, str], evaluation: Path
) -> None:
    """A resumed run with another incumbent updates only that."""
    url, record = environment["NUDGE_REGISTRY_URL"], ("found", "v1", '{"v1": 100}')
    release("compared", "v2")

    def properties(version: str) -> dict[str, Any]:
        return dict(with_registry(url, find_version("compared", version)).properties)

    first = properties("v2")
    assert tuple(first[key] for key in RECORD) == record
    body = json.loads(evaluation.read_text())
    body["incumbent"] = {"state": "none", "version": "", "uri": "", "shares": {}}
    evaluation.write_text(json.dumps(body))
    release("compared", "v2")
    again = {"incumbent_state": "none", "incumbent": "", "incumbent_traffic": "{}"}
    assert properties("v2") == {**first, **again}
    del body["incumbent"]  # as in an older release
    evaluation.write_text(json.dumps(body))
    release("compared", "v3")
    assert not set(RECORD) & properties("v3").keys()


def versions(environment: dict[str, str], name: str) -> dict[str, bool]:
    """The model's versions, and whether each is archived."""
    found = with_registry(environment["NUDGE_REGISTRY_URL"], list_versions(name))
    return {version.name: version.archived for version in found}


def objects(name: str) -> set[str]:
    keys = list_keys(s3_client(), services.BUCKET, f"models/{name}")
    return {key.split("/")[2] for key in keys}


def test_a_run_registers_once_and_no_other_run_gets_its_version(
    release: Release, environment: dict[str, str]
) -> None:
    first = release("once", "v1", run="run-1")
    assert release("once", "v1", run="run-1") == first
    with pytest.raises(UserError, match="v1 is registered already, by run 'run-1'"):
        release("once", "v1", run="run-2")
    assert objects("once") == {"v1"}  # no pending registration, which could never succeed
    assert versions(environment, "once") == {"v1": False}
    version = with_registry(environment["NUDGE_REGISTRY_URL"], find_version("once", "v1"))
    assert version.id == first["version_id"]
    assert version.properties["train.rates"] == "[0.001]"
    assert version.properties["candidate.bits_per_byte"] == 0.9
    assert "candidate.word_perplexity" not in version.properties  # text of one word has none


def test_old_versions_are_archived_and_deleted_unless_needed(
    release: Release, environment: dict[str, str]
) -> None:
    url = environment["NUDGE_REGISTRY_URL"]
    for version in ("v1", "v2", "v3", "v4"):
        release("kept", version)
    third = with_registry(url, find_version("kept", "v3"))
    served = Served("kept", "http://127.0.0.1:1", {"v3": 100}, ("v1", "v2", "v3"))
    with_registry(url, note_served(third, served, "local", "transformers"))

    result = release("kept", "v5", keep_versions=1)
    assert (result["archived"], result["deleted"]) == (["v1", "v4"], [])
    archived = {"v1": True, "v2": False, "v3": False, "v4": True, "v5": False}
    assert versions(environment, "kept") == archived
    assert objects("kept") == {"v1", "v2", "v3", "v4", "v5"}

    result = release("kept", "v6", keep_versions=2, delete_archived=True)
    assert (result["archived"], sorted(result["deleted"])) == ([], ["v1", "v4"])
    assert objects("kept") == {"v2", "v3", "v5", "v6"}
    assert versions(environment, "kept") == archived | {"v6": False}


def test_the_command_in_the_error_finishes_a_registration_after_an_outage(
    release: Release,
    parts: tuple[Path, dict[str, str]],
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, _ = parts
    monkeypatch.setattr(connection, "ATTEMPTS_S", 0.5)
    processes.stop(home, services.REGISTRY)
    with pytest.raises(UserError, match="does not answer") as error:
        release("later", "v1", run="run-1")
    uri = f"s3://{services.BUCKET}/models/later/v1"
    assert f"safe at {uri}" in str(error.value)
    command = shlex.split(str(error.value).splitlines()[-1])
    named = ["--registry-url", "embedded", "--store", "embedded", "--home", str(home)]
    assert command[:-2] == ["nudge", "register", uri, *named]
    assert command[-2] == "--sha256"

    monkeypatch.setattr(connection, "ATTEMPTS_S", 60.0)
    # Another registry and folder in this shell change nothing and keep the pending registration.
    monkeypatch.setenv("NUDGE_EMBEDDED", "")
    monkeypatch.setenv("NUDGE_REGISTRY_URL", "http://127.0.0.1:9")
    other = CliRunner().invoke(main, [*command[1:3], *command[-2:]])
    assert other.exit_code == 2
    assert "the run used the registry" in other.output
    monkeypatch.setenv("NUDGE_HOME", str(home.parent / "elsewhere"))
    _refuse_a_forged_registration(command, uri)
    done = CliRunner().invoke(main, command[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "later v1 is registered" in done.output
    assert versions(environment, "later") == {"v1": False}
    version = with_registry(environment["NUDGE_REGISTRY_URL"], find_version("later", "v1"))
    assert (version.uri, version.properties["run_id"]) == (uri, "run-1")
    assert objects("later") == {"v1"}  # the pending registration is gone

    again = CliRunner().invoke(main, command[1:])
    assert again.exit_code == 2
    assert "no registration is pending" in again.output
    assert versions(environment, "later") == {"v1": False}
    none = CliRunner().invoke(main, ["register", f"{uri}0"])
    assert none.exit_code == 2
    assert "is not a complete version" in none.output


def _refuse_a_forged_registration(command: list[str], uri: str) -> None:
    """A writer of the bucket changes what is registered; nothing is, until it is as it was."""
    bucket, key = services.BUCKET, uri.removeprefix(f"s3://{services.BUCKET}/")
    key = f"{key}.registration.json"
    saved = s3_client().get_object(Bucket=bucket, Key=key)["Body"].read()
    forged = saved.replace(b'"run_id": "run-1"', b'"run_id": "evil"')
    assert forged != saved
    s3_client().put_object(Bucket=bucket, Key=key, Body=forged)
    refused = CliRunner().invoke(main, command[1:])
    assert refused.exit_code == 2
    assert "it was changed since" in refused.output
    unsigned = CliRunner().invoke(main, command[1:-2])
    assert unsigned.exit_code == 2
    assert "--sha256 is missing" in unsigned.output
    s3_client().put_object(Bucket=bucket, Key=key, Body=saved)


@pytest.mark.long
def test_an_image_is_registered_and_finished_after_an_outage_too(
    parts: tuple[Path, dict[str, str]],
    environment: dict[str, str],
    model: Path,
    evaluation: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, _ = parts
    with ImageRegistry(tmp_path / "images") as images:
        make_base_image(f"oci://{images.host}/base:1")
        sent = UploadSettings(
            model_name="image",
            target=f"oci://{images.host}/team",
            base_image=f"{images.host}/base:1",
        )
        uri = upload(sent, model=model, version="v1")["uri"]
        given = RegisterSettings(model_name="image")
        inputs: dict[str, Any] = {
            "version": "v1", "run_id": "run-1", "model": model, "evaluation": evaluation,
        }  # fmt: skip
        monkeypatch.setattr(connection, "ATTEMPTS_S", 0.5)
        processes.stop(home, services.REGISTRY)
        with pytest.raises(UserError, match="does not answer") as failed:
            register(given, uri=uri, **inputs)
        command = shlex.split(str(failed.value).splitlines()[-1])
        assert command[:5] == ["nudge", "register", uri, "--registry-url", "embedded"]

        monkeypatch.setattr(connection, "ATTEMPTS_S", 60.0)
        monkeypatch.delenv("NUDGE_REGISTRY_URL")
        done = CliRunner().invoke(main, command[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        monkeypatch.setenv("NUDGE_REGISTRY_URL", services.up(home)["NUDGE_REGISTRY_URL"])
        register(given, uri=uri, **inputs)
        assert versions(environment, "image") == {"v1": False}
        assert list_keys(s3_client(), services.BUCKET, "registrations") == {}
        version = with_registry(environment["NUDGE_REGISTRY_URL"], find_version("image", "v1"))
        assert version.uri == uri

        # On this machine the server reads the model from the image.
        folder = LocalServing(tmp_path / "home", DeploySettings())._fetch(version)
        files = {path.name for path in model.iterdir()} | {"manifest.json"}
        assert {path.name for path in (folder / "image").iterdir()} == files


def test_an_evaluation_of_an_older_release_or_of_other_weights_is_rejected(
    environment: dict[str, str], model: Path, evaluation: Path
) -> None:
    inputs: dict[str, Any] = {
        "uri": "s3://b/k", "version": "v1", "run_id": "r", "model": model,
    }  # fmt: skip
    facts = json.loads((model / "nudge.json").read_text()) | {"weights_sha256": "f" * 64}
    (model / "nudge.json").write_text(json.dumps(facts))
    with pytest.raises(
        UserError, match="weights with the sha256 [0-9a-f]{64}, but training wrote f{64}"
    ):
        register(RegisterSettings(model_name="m"), evaluation=evaluation, **inputs)

    older = json.loads(evaluation.read_text())
    del older["models"], older["probes"]
    evaluation.write_text(json.dumps(older))
    with pytest.raises(UserError, match="has no models, probes: an older nudge wrote it"):
        register(RegisterSettings(model_name="m"), evaluation=evaluation, **inputs)


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def test_the_token_is_sent_only_over_tls_with_a_known_authority(
    release: Release,
    environment: dict[str, str],
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    token = (tmp_path / "token").read_text()
    with FaultyProxy(environment["NUDGE_REGISTRY_URL"], share=0.0, tls=context) as proxy:
        with pytest.raises(UserError, match="set NUDGE_REGISTRY_CA to the file"):
            release("secure", "v1", registry_url=proxy.url)
        assert not proxy.requests
        authority.cert_pem.write_to_path(tmp_path / "ca.crt")
        monkeypatch.setenv("NUDGE_REGISTRY_CA", str(tmp_path / "ca.crt"))
        release("secure", "v1", registry_url=proxy.url)
        headers = [headers for _, _, headers, _ in proxy.requests]
        assert headers
        assert {each.get("Authorization") for each in headers} == {f"Bearer {token}"}
    assert versions(environment, "secure") == {"v1": False}


@pytest.fixture
def refusing() -> Iterator[HTTPServer]:
    """Answers every request with its ``status``."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked += 1  # type: ignore[attr-defined]
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    server.asked = 0  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "said"), [(401, "it does not accept"), (403, "bind it to")])
def test_the_error_has_the_reason_of_the_registry(
    refusing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, said: str
) -> None:
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("the-token")
    refusing.status = status
    with pytest.raises(Unreachable, match=said) as error:
        with_registry(f"http://127.0.0.1:{refusing.server_port}", find_served("m"))
    assert f"answered {status}" in str(error.value)
    assert "the-token" not in str(error.value)
    assert refusing.asked == 1
