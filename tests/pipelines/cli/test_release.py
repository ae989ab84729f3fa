"""The commands between versions: reading starts nothing, and neither does what makes no sense."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import (
    Served,
    find_version,
    note_properties,
    note_served,
)
from nudge.components.common.core.environment import REGISTRY_TOKEN_PATH
from nudge.components.common.local import guard, processes
from nudge.components.deploy.approval import ask_for
from nudge.components.deploy.local import gateway
from nudge.components.deploy.local.local_serving import LocalServing
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import parts, services
from tests.components.deploy.local_promote import quick_server as start_quick_server

NAME = "m"


def nudge(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def down(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two versions; v1 was served before everything went down; gives its address."""
    from model_registry import ModelRegistry

    for name in services.VARIABLES:  # what the commands set is gone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    port = processes.free_port()
    endpoint = f"http://127.0.0.1:{port}"
    url = parts.start_registry(home, 0).address
    token = guard.token_file(home, services.REGISTRY)
    monkeypatch.setenv(REGISTRY_TOKEN_PATH, str(token))
    client = ModelRegistry(url, author="test", is_secure=False)
    for version in ("v1", "v2"):
        client.register_model(
            NAME, f"s3://nudge/models/{NAME}/{version}", version=version,
            model_format_name="vLLM", model_format_version="1",
        )  # fmt: skip
    first = with_registry(url, find_version(NAME, "v1"))
    served = Served(NAME, endpoint, {"v1": 100}, ("v1",))
    with_registry(url, note_served(first, served, "local", "transformers"))
    route = gateway.Backends(port, {"v1": 100}, {"v1": "127.0.0.1:1"})
    gateway.switch(home / "gateway" / NAME, route)
    services.down(home)
    return endpoint


def test_models_starts_nothing_and_says_what_does_not_run(down: str, home: Path) -> None:
    rows = json.loads(nudge("models", "--json").stdout)
    assert [(row["version"], row["share"], row["endpoint"], row["running"]) for row in rows] == [
        ("v1", 100, down, False),
        ("v2", 0, None, None),
    ]
    assert f"{NAME}  {down} (not running: `nudge services up`)" in nudge("models").stdout
    assert processes.records(home) == []


def test_where_nothing_was_run_models_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NUDGE_HOME", raising=False)
    monkeypatch.delenv("NUDGE_REGISTRY_URL", raising=False)
    done = nudge("models", "--json")
    assert json.loads(done.stdout) == []
    assert f"no models: nothing was run in this folder ({tmp_path}/.nudge)" in done.stderr
    assert "nothing was run in this folder" in nudge("promote", "v1", status=2).stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rollback", "--to", "nope"), "no version 'nope' of m"),
        (("rollback",), "m v1 is the first version that was served"),
        (("rollback", "--model", "other"), "no version of other is served"),
        (("promote", "v3"), "no version 'v3' of m"),
        (("split", "v1=90", "v2=20"), "the shares v1 90, v2 20 do not add up to 100"),
        (("promote", "v2", "--model", " m"), "begins or ends with a blank"),
        (("promote", "v2", "--model", "m" * 245), "the registry stores up to 244"),
        (("promote", "v2", "--model", "m\x01"), "contains the control character"),
    ],
)
def test_what_makes_no_sense_starts_nothing(
    down: str, home: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in nudge(*arguments, status=2).stderr
    assert processes.records(home) == []


def test_a_promote_says_what_it_starts_and_each_stage(
    down: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalServing, "_fetch", lambda self, version: tmp_path)
    monkeypatch.setattr(LocalServing, "_serve", start_quick_server)
    done = nudge("promote", "v2")
    assert done.stdout == f"{NAME}: v2 100 % at {down}\n"
    assert done.stderr.splitlines() == [
        "started object-store and model-registry; stop with `nudge services down`",
        f"{NAME}: starting v2",
        f"{NAME}: testing v2",
        f"{NAME}: moving the traffic",
        f"{NAME}: stopping other versions",
    ]
    (row,) = [row for row in json.loads(nudge("models", "--json").stdout) if row["share"]]
    assert (row["version"], row["running"]) == ("v2", True)
    done = nudge("rollback")
    assert (done.stdout, "stages" in done.stderr) == (f"{NAME}: v1 100 % at {down}\n", False)
    services.down(home)
    done = nudge("services", "up")
    assert f"{NAME}: starting v1" in done.stderr
    assert "stages" not in done.stderr


def test_models_and_promote_say_when_there_are_none(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUDGE_REGISTRY_URL", raising=False)
    parts.start_registry(home, 0)
    services.down(home)
    done = nudge("models")
    assert (done.stdout, "no models: nothing is registered yet" in done.stderr) == ("", True)
    assert "there are no models yet" in nudge("promote", "v1", status=2).stderr


def test_the_end_of_a_version_is_enough(down: str, home: Path) -> None:
    from nudge.pipelines.cli import connections

    with connections.registry() as ask:
        assert connections.version_name(ask, NAME, "2") == "v2"
    assert "'v' fits 2 versions (v1, v2)" in nudge("promote", "v", status=2).stderr
    assert "name one version twice" in nudge("split", "1=50", "v1=50", status=2).stderr


def test_a_version_is_approved_or_rejected(
    down: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalServing, "_fetch", lambda self, version: tmp_path)
    monkeypatch.setattr(LocalServing, "_serve", start_quick_server)
    assert "v2 does not await approval" in nudge("approve", "v2", status=2).stderr
    url = services.up(home)["NUDGE_REGISTRY_URL"]
    version = with_registry(url, find_version(NAME, "v2"))
    wait = ask_for(version, "awaiting approval")
    with_registry(url, note_properties(version.id, wait))
    shown = nudge("models").stdout  # of 80 columns
    assert re.search(r"│ v2 .*\n│ \(awaiting approval\)", shown)
    assert "…" not in shown
    shown = nudge("approve", "v2", "--no-deploy", "--reason", "reads well").stdout
    assert re.match(rf"{NAME} v2: approved by \S+@\S+ at 20\d\d-", shown)
    assert "next: run the pipeline deploy-approved with model_name=m and version=v2" in shown
    assert nudge("approve", "v2").stdout.endswith(f"{NAME}: v2 100 % at {down}\n")
    assert "v2 was approved by" in nudge("reject", "v2", status=2).stderr

    version = with_registry(url, find_version(NAME, "v1"))
    with_registry(url, note_properties(version.id, {**wait, "run_id": "run-9"}))
    run = home / "runs" / "run-9"
    run.mkdir(parents=True)
    assert f"{NAME} v1: rejected by" in nudge("reject", "v1").stdout
    assert json.loads((run / "decision.json").read_text())["state"] == "rejected"
    assert "the version is archived, and a new run" in nudge("approve", "v1", status=2).stderr
    assert re.search(r"│ v1 .*\n│ \(rejected, archived\)", nudge("models").stdout)
