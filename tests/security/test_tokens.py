"""A token goes to the server that it is for, over https, and to no other one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.registry import connection
from nudge.components.common.clients.registry.releases import find_served
from nudge.components.common.core.errors import UserError
from nudge.components.common.local.child_environment import child_environment
from nudge.components.train import torchrun
from nudge.components.train.cluster import jobs, rayjob, trainjob
from nudge.components.train.settings import LaunchSettings, TrainSettings
from nudge.pipelines.cluster import connect
from tests.kubernetes_schemas import definition, schema
from tests.security.test_image_registries import Server

LOCAL, ROUTE = "http://127.0.0.1:8081", "https://registry.apps.example.com"
INSIDE = "https://model-registry.rhoai-model-registries.svc:8443"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "token"
    path.write_text("canary-token")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(path))
    return "canary-token"


@pytest.mark.parametrize(
    ("configured", "url", "right"),
    [
        (LOCAL, LOCAL, True),
        (INSIDE, INSIDE, True),
        ("", INSIDE, True),
        (ROUTE, ROUTE, True),
        (ROUTE, INSIDE, True),
        (LOCAL, ROUTE, False),  # a recipe names a registry elsewhere on a laptop
        (LOCAL, INSIDE, False),
        ("", ROUTE, False),
        (INSIDE, ROUTE, False),
        (INSIDE, INSIDE.replace("https", "http"), False),
        (ROUTE.replace("https", "http"), ROUTE.replace("https", "http"), False),
        (ROUTE, f"{ROUTE}.evil.example", False),
        (ROUTE, f"{ROUTE}:8443", False),
        (INSIDE, "https://evil.example/x.svc", False),
        ("", "https://svc.evil.example", False),
    ],
)
def test_which_registry_may_have_the_token(
    configured: str, url: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_REGISTRY_URL", configured)
    assert connection.may_have_token(url) is right


def test_a_registry_that_a_recipe_names_gets_no_token(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"code": "401", "message": "no"}).encode()
    answer = (401, {"content-type": "application/json"}, body)
    with Server(lambda *_: answer) as registry:
        url = f"http://{registry.host}"
        monkeypatch.setattr(connection, "LOOPBACK", ("localhost",))  # an address elsewhere
        monkeypatch.setenv("NUDGE_REGISTRY_URL", "http://localhost:1")
        with pytest.raises(UserError, match="set NUDGE_REGISTRY_URL"):
            connection.with_registry(url, find_served("m"))
        assert registry.seen
        assert registry.secrets() == []
        monkeypatch.setattr(connection, "LOOPBACK", ("localhost", "127.0.0.1"))
        with pytest.raises(UserError, match="the token in"):
            connection.with_registry(url, find_served("m"))
        assert f"Bearer {token}" in registry.secrets()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_registrys_token_follows_no_redirect_to_another_host(status: int, token: str) -> None:
    body = json.dumps({"code": "401", "message": "no"}).encode()
    headers = {"content-type": "application/json"}
    with Server(lambda *_: (401, headers, body), "127.0.0.2") as elsewhere:

        def answer(_: str, path: str) -> Any:
            return status, {"location": f"http://{elsewhere.host}{path}"}, b""

        with Server(answer) as registry:
            with pytest.raises(UserError):
                connection.with_registry(f"http://{registry.host}", find_served("m"))
            assert registry.secrets() != []
        assert elsewhere.secrets() == []


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_pipelines_servers_token_follows_no_redirect(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", "canary-token")
    with Server(lambda *_: (200, {}, b"{}"), "127.0.0.2") as elsewhere:
        target = {"location": f"http://{elsewhere.host}/"}
        with Server(lambda *_: (status, target, b"")) as server:
            found = connect.connect(f"http://{server.host}")
            with pytest.raises(UserError):
                found.change("list", found.api("RunServiceApi").run_service_list_runs)
            assert server.secrets() == ["Bearer canary-token"]
        assert elsewhere.secrets() == []


@pytest.mark.parametrize("url", ["http://ds-pipeline.example.com", "http://evil.example:8888/x"])
def test_the_pipelines_servers_token_goes_over_https_only(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no `oc`
    monkeypatch.delenv("NUDGE_PIPELINES_TOKEN", raising=False)
    assert connect.connect(url).token == ""
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", "canary-token")
    with pytest.raises(UserError, match="over https only"):
        connect.connect(url)
    assert connect.connect(url.replace("http:", "https:")).token == "canary-token"


def test_the_ranks_of_a_training_get_no_token_of_the_step(
    token: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "canary-token")
    monkeypatch.setenv("KUBECONFIG", "canary-token")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "needed")
    started: list[dict[str, str]] = []

    class Ranks:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            assert command[1] == "-P"
            started.append(env)

        def wait(self) -> int:
            return 0

        def poll(self) -> int:
            return 0

    with monkeypatch.context() as patch:
        patch.setattr("nudge.components.train.torchrun.subprocess.Popen", Ranks)
        settings = TrainSettings(mode="scratch", model_size="10M")
        torchrun.run_ranks(2, settings, {"data": tmp_path})
    script = "import json,os,sys; print(json.dumps([dict(os.environ), sys.flags.safe_path]))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=started[0], capture_output=True, text=True, check=True
    )
    variables, safe = json.loads(done.stdout)
    assert safe
    assert variables["AWS_ACCESS_KEY_ID"] == "needed"
    assert not {"GITHUB_TOKEN", "KUBECONFIG", "KF_PIPELINES_SA_TOKEN_PATH"} & variables.keys()
    assert "canary-token" not in str(variables)


@pytest.mark.parametrize("engine", [trainjob, rayjob], ids=["trainjob", "rayjob"])
def test_a_jobs_pods_run_no_code_of_their_working_directory(engine: Any, tmp_path: Path) -> None:
    """The command and variables of the job, run where a file stands in for a module of Python."""
    found = definition({"apiVersion": engine.KIND.api_version, "kind": engine.KIND.name})
    assert found
    body = engine.body(
        LaunchSettings(), name="n", handover="s3://b/k", schema=schema(found), step=jobs.Step("i")
    )
    if engine is trainjob:
        commands = [body["spec"]["trainer"]["command"]]
        environments = [body["spec"]["trainer"]["env"]]
    else:
        commands = [body["spec"]["entrypoint"].split()]
        cluster = body["spec"]["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        environments = [g["template"]["spec"]["containers"][0]["env"] for g in groups]
    (tmp_path / "click.py").write_text("print('attacked')")
    (tmp_path / "nudge").mkdir()
    (tmp_path / "nudge" / "__init__.py").write_text("print('attacked')")
    for command in commands:
        assert command[0] == "python"
        flags = command[1 : command.index("-m")]
        done = subprocess.run(
            [sys.executable, *flags, "-c", "import nudge, click"], cwd=tmp_path,
            env=child_environment() | {"PYTHONSAFEPATH": ""},
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for environment in environments:
        variables = {e["name"]: e["value"] for e in environment if "value" in e}
        done = subprocess.run(
            [sys.executable, "-m", "click"], cwd=tmp_path,
            env={**os.environ, "PYTHONSAFEPATH": "", **variables}, capture_output=True, text=True,
        )  # fmt: skip
        assert "attacked" not in done.stdout
