"""`nudge doctor` finds what is missing, says how to fix it, and shows that the rest is fine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nudge.pipelines.cli.main import main
from nudge.pipelines.cluster import doctor
from tests.pipelines.cluster.pipelines_server import Pipelines, serving

VARIABLES = ("AWS_S3_ENDPOINT", "AWS_S3_BUCKET", "NUDGE_REGISTRY_URL", "NUDGE_PIPELINES_URL")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipelines]:
    state = Pipelines()
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", state.token)
    with serving(state) as address:
        monkeypatch.setenv("NUDGE_PIPELINES_URL", address)
        yield state


def states() -> dict[str, doctor.Finding]:
    return {finding.check: finding for finding in doctor.examine()}


def program(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_laptop_lacks_nothing_and_sees_what_is_not_used() -> None:
    found = states()
    for name in ("python", "packages", "object store", "disk"):
        assert found[name].state == "ok", found[name]
    for name in (
        "data connection",
        "model registry",
        "pipelines server",
        "permissions",
        "pod security",
    ):
        assert found[name].state == "not used"


@pytest.mark.parametrize("where", ["a file", "/proc"])
def test_a_disk_that_cannot_be_written_is_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("NUDGE_HOME", str((tmp_path / where).resolve() / "home"))
    disk = states()["disk"]
    assert (disk.state, disk.fix) == (
        "missing",
        "set NUDGE_HOME to a folder that you can write to",
    )
    assert "cannot be written to" in disk.found


def test_doctor_names_no_option_that_it_has_not() -> None:
    assert "--" not in CliRunner().invoke(main, ["doctor"]).output


def test_everything_missing_comes_with_what_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "DISK_GB", 1e9)
    monkeypatch.setenv("AWS_S3_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("NUDGE_REGISTRY_URL", "http://127.0.0.1:1")
    program(tmp_path, "nvidia-smi", "exit 9")
    program(tmp_path, "oc", "echo no")
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 1
    missing = [each for each in doctor.examine() if each.state == "missing"]
    assert {each.check for each in missing} >= {
        *("disk", "data connection", "model registry", "GPU", "permissions")
    }
    assert all(each.fix for each in missing)
    assert "oc apply -k" in shown.output


@pytest.mark.parametrize(
    ("allowed", "state", "says"),
    [
        ("*", "ok", "to submit, and to promote from here"),
        ("*datasciencepipelines*|*pods*log*", "ok", "lack create inferenceservices.serving"),
        ("*inferenceservices*", "missing", "create datasciencepipelinesapplications"),
        ("nothing", "missing", "get pods/log"),
    ],
)
def test_the_rights_of_an_author_and_of_a_run_are_distinguished(
    tmp_path: Path, allowed: str, state: str, says: str
) -> None:
    program(tmp_path, "oc", f'case "$*" in {allowed}) echo yes;; *) echo no;; esac')
    found = states()["permissions"]
    assert found.state == state
    assert says in found.found
    assert bool(found.fix) is (state == "missing")


@pytest.mark.parametrize(
    ("labels", "sccs", "state", "says"),
    [
        ({doctor.ENFORCE: "restricted"}, "exit 1", "missing", "no model can be served in it"),
        ({doctor.ENFORCE: "baseline"}, "exit 1", "ok", "the namespace team enforces baseline"),
        ({}, "exit 1", "ok", "the namespace team enforces no level"),
        ({doctor.ENFORCE: "restricted"}, "echo {}", "ok", "SCCs complete the pods"),
    ],
)
def test_a_namespace_that_admits_no_predictor_is_found(
    tmp_path: Path, labels: dict[str, str], sccs: str, state: str, says: str
) -> None:
    namespace = json.dumps({"metadata": {"name": "team", "labels": labels}})
    program(
        tmp_path, "oc",
        f"""case "$*" in
        *security.openshift.io*) {sccs};;
        *"config view"*) echo team;;
        *"get namespace team"*) echo '{namespace}';;
        *) echo no;;
        esac""",
    )  # fmt: skip
    found = states()["pod security"]
    assert (found.state, says in found.found) == (state, True), found
    if state == "missing":
        assert "kubectl label namespace team --overwrite" in found.fix
        assert f"{doctor.ENFORCE}=baseline" in found.fix


def test_a_pipelines_server_is_asked(server: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states()["pipelines server"].state == "ok"
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", "stale")
    found = states()["pipelines server"]
    assert found.state == "missing"
    assert "oc login" in found.fix
    assert server.faults == []


def test_a_registry_is_asked_for_the_prefix_that_it_has(
    connected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    found = states()
    assert found["model registry"].state == "ok"
    assert "v1alpha3 200" in found["model registry"].found
    assert found["data connection"].state == "ok"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = states()["data connection"]
    assert refused.state == "missing"
    assert "AWS_SECRET_ACCESS_KEY" in refused.found
