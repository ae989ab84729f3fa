"""Refusals, faults, TLS and tokens of a pipelines server, each reported in one sentence."""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from nudge.components.common.core.errors import UserError
from nudge.pipelines.cluster import connect
from tests.pipelines.cluster.conftest import nudge, schedule_file
from tests.pipelines.cluster.pipelines_server import Pipelines, serving


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure(
    state: Pipelines, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A server behind TLS as a cluster's is; its name there leads to this machine."""
    name = "ds-pipeline-nudge.nudge.svc"
    certificate = authority.issue_cert(name, "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    known = socket.getaddrinfo

    def here(host: str, *given: Any, **named: Any) -> Any:
        return known("127.0.0.1" if host == name else host, *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    monkeypatch.setattr(connect, "PATIENCE_S", 0.0)
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", state.token)
    pem = str(tmp_path / "server.pem")
    with serving(state, ssl_certfile=pem, ssl_keyfile=pem) as address:
        yield address.replace("127.0.0.1", name)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "it does not accept the request (as the test says)"),
        (401, "oc login"),
        (403, "nudge-author"),
        (404, "it does not exist"),
        (409, "it exists already"),
        (500, "ds-pipeline"),
    ],
)
def test_a_refusal_is_one_sentence_that_says_what_to_do(
    state: Pipelines,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    says: str,
) -> None:
    monkeypatch.setattr(connect, "PATIENCE_S", 0.0)
    nudge("upload")
    asked, file = ("pause", "delete"), schedule_file(tmp_path)
    for command in (
        *(["upload"], ["submit"], ["schedule", "apply", file], ["schedule", "list"]),
        *(["schedule", verb, "nightly"] for verb in asked),
    ):
        state.breaks = [status]
        refused = nudge(*command)
        assert refused.exit_code == 2, command
        assert f"answered {status}" in refused.stderr
        assert says in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        assert state.token not in refused.output
    assert state.runs == state.recurring == {}


def test_a_question_is_asked_again_and_a_change_is_not(state: Pipelines, url: str) -> None:
    state.breaks = [503, 503]
    assert nudge("upload").exit_code == 0
    server, posts = connect.connect(), [asked for asked in state.asked if asked[0] == "POST"]
    state.breaks = [503]
    with pytest.raises(UserError, match="answered 503"):
        server.change(
            "create", server.api("ExperimentServiceApi").experiment_service_create_experiment, {}
        )
    assert len([asked for asked in state.asked if asked[0] == "POST"]) == len(posts) + 1
    state.asked.pop()


def test_a_server_that_is_away_slow_or_unknown(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "PATIENCE_S", 0.0)
    monkeypatch.setattr(connect, "TIMEOUTS_S", (0.5, 0.5))
    state.breaks = [0]
    assert "did not answer in time" in nudge("upload").stderr
    assert "cannot be reached" in nudge("upload", "--url", "http://127.0.0.1:1").stderr
    monkeypatch.delenv("NUDGE_PIPELINES_URL")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "set NUDGE_PIPELINES_URL" in nudge("upload").stderr


def test_a_cluster_s_own_ca_is_trusted_when_it_is_named(
    state: Pipelines, secure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = nudge("upload", "--url", secure)
    assert unknown.exit_code == 2
    assert "is not signed by a known CA; set NUDGE_PIPELINES_CA" in unknown.stderr
    assert state.asked == []
    monkeypatch.setenv("NUDGE_PIPELINES_CA", str(tmp_path / "ca.crt"))
    assert "uploaded" in nudge("upload", "--url", secure).stdout
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.crt")
    monkeypatch.setenv("NUDGE_PIPELINES_CA", str(tmp_path / "other.crt"))
    assert "is not signed by a known CA" in nudge("upload", "--url", secure).stderr
    monkeypatch.setenv("NUDGE_PIPELINES_CA", __file__)
    assert "cannot be read as PEM" in nudge("upload", "--url", secure).stderr


def test_the_certificate_must_be_of_the_name_that_was_asked_for(
    state: Pipelines, secure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_PIPELINES_CA", str(tmp_path / "ca.crt"))
    port = secure.rpartition(":")[2]
    other = nudge("upload", "--url", f"https://localhost:{port}")
    assert "is for a different name" in other.stderr
    with serving(state) as plain:
        turned = nudge("upload", "--url", plain.replace("http:", "https:"))
    assert "does not speak TLS" in turned.stderr
    assert state.asked == []


def test_a_pod_speaks_with_its_service_account(
    state: Pipelines, secure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUDGE_PIPELINES_TOKEN")
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text(f"{state.token}\n")
    (account / "namespace").write_text("nudge")
    shutil.copy(tmp_path / "ca.crt", account / "service-ca.crt")
    monkeypatch.setattr(connect, "SERVICE_ACCOUNT", account)
    assert "uploaded" in nudge("upload", "--url", secure).stdout
    assert state.faults == []


def test_a_person_speaks_with_the_token_of_oc(
    state: Pipelines, secure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUDGE_PIPELINES_TOKEN")
    monkeypatch.setenv("NUDGE_PIPELINES_CA", str(tmp_path / "ca.crt"))
    program = tmp_path / "oc"
    answers = f"*whoami*) echo {state.token};; *externalUrl*) echo {secure};;"
    program.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "uploaded" in nudge("upload").stdout


def test_token_ca_and_address_as_on_openshift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NUDGE_PIPELINES_URL", "NUDGE_PIPELINES_TOKEN", "NUDGE_PIPELINES_CA"):
        monkeypatch.delenv(name, raising=False)
    oc = tmp_path / "bin" / "oc"
    oc.parent.mkdir()
    oc.write_text(
        '#!/bin/sh\ncase "$*" in *whoami*) echo sha256~mine;; *) echo ds-pipeline.example;; esac\n'
    )
    oc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{oc.parent}:/usr/bin:/bin")
    found = connect.connect()
    assert (found.url, found.token) == ("https://ds-pipeline.example", "sha256~mine")
    assert "sha256~mine" not in repr(found)
    trustme.CA().cert_pem.write_to_path(tmp_path / "service-ca.crt")
    for name in ("token", "namespace"):
        (tmp_path / name).write_text(f"in-pod-{name}\n")
    monkeypatch.setattr(connect, "SERVICE_ACCOUNT", tmp_path)
    inside = connect.connect("https://ds-pipeline.project.svc:8443")
    assert (inside.token, inside.namespace) == ("in-pod-token", "in-pod-namespace")
    assert inside.ca == str(tmp_path / "service-ca.crt")
    monkeypatch.setenv("NUDGE_PIPELINES_CA", "/nowhere/ca.crt")
    with pytest.raises(UserError, match="no such file"):
        connect.connect("x")
