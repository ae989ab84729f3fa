"""`nudge run` killed by SIGKILL between any two of the steps that others see, and run again: the
same run goes on, and there is one version, one endpoint and nothing besides."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import nudge.pipelines.recipes
from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import find_served, list_versions
from nudge.components.common.clients.storage import s3_client
from nudge.components.common.local import processes
from nudge.pipelines.local import services
from tests.end_to_end.workspace import Workspace, eventually, statuses
from tests.local_registry import endpoint_headers
from tests.objects import list_keys

SERVER = "nudge.components.deploy.local.model_server"
BOUNDARIES = [
    ("upload", "step_end"),
    ("register", "step_end"),
    ("deploy", "step_end"),
]
"""Within an upload, a registration and a promote: see the tests of those steps."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Workspace]:
    workspace = Workspace(tmp_path_factory.mktemp("cut-off"), tiny_model)
    workspace.run("--set", "evaluate.margin=50")  # later runs reuse the steps before the upload
    yield workspace
    workspace.nudge("services", "down")


def kill_at(workspace: Workspace, step: str, event: str, *arguments: str) -> str:
    """Start a run and end the command that it is of at an event; returns the run's id."""
    before = workspace.folders()
    running = workspace.start(*arguments)
    (folder,) = eventually(lambda: workspace.folders() - before)
    events = folder / "events.jsonl"
    wanted = f'"step": "{step}", "event": "{event}"'
    eventually(lambda: events.exists() and wanted in events.read_text(), timeout_s=300)
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    servers = {record.pid for record in processes.records(workspace.home)}
    steps = [
        each
        for each in family
        if not {each.pid, *(parent.pid for parent in parents(each))} & servers
    ]
    _, alive = psutil.wait_procs(steps, timeout=60)
    assert alive == []
    return str(folder.name)


def parents(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.parents()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("step", "event"), BOUNDARIES)
def test_killed_and_run_again(
    workspace: Workspace, step: str, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"cut-{step}-{event.replace('_', '-')}"
    arguments = ("--set", f"model_name={name}")
    run_id = kill_at(workspace, step, event, *arguments)
    result = workspace.run(*arguments)
    assert result["error"] is None
    assert (result["run_id"], result["version"], result["promoted"]) == (run_id, run_id, True)

    for key, value in services.up(workspace.home).items():
        monkeypatch.setenv(key, value)
    url = os.environ["NUDGE_REGISTRY_URL"]
    assert [each.name for each in with_registry(url, list_versions(name))] == [run_id]
    served = with_registry(url, find_served(name))
    assert served is not None
    assert (served.shares, served.endpoint) == ({run_id: 100}, result["endpoint"])
    client = s3_client()
    keys = list_keys(client, services.BUCKET, f"models/{name}")
    assert {key.split("/")[2] for key in keys} == {run_id}
    assert f"models/{name}/{run_id}/manifest.json" in keys
    begun = client.list_multipart_uploads(Bucket=services.BUCKET, Prefix=f"models/{name}/")
    assert begun.get("Uploads", []) == []

    here = [each for each in processes.records(workspace.home) if name in each.name]
    assert {each.name for each in here} == {f"gateway-{name}", f"serving-{name}@{run_id}"}
    # No server that a killed command began runs on without a record.
    programs = [
        each.pid
        for each in psutil.process_iter(["cmdline"])
        if SERVER in (each.info["cmdline"] or ()) and name in each.info["cmdline"]
    ]
    assert programs == [each.pid for each in here if each.name.startswith("serving-")]
    assert not list((workspace.home / "serving" / name).glob(".*"))
    body = {"model": name, "prompt": "The", "max_tokens": 2}
    answer = httpx.post(
        f"{result['endpoint']}/v1/completions",
        json=body,
        headers=endpoint_headers(workspace.home),
        timeout=60,
    )
    assert answer.json()["choices"][0]["text"]
    (kept,) = (folder for folder in workspace.folders() if folder.name == run_id)
    assert json.loads((kept / "result.json").read_text())["version"] == run_id


@pytest.mark.long
@pytest.mark.timeout(900)
def test_with_new_text_it_is_another_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the old name its model, which is reused from a run before, would be refused at the
    upload."""
    text = workspace.folder / "text"
    text.mkdir()
    shipped = Path(nudge.pipelines.recipes.__path__[0]) / "corpora" / "paris"
    lines = [line for path in shipped.glob("*.jsonl") for line in path.read_text().splitlines()]
    (text / "first.jsonl").write_text("\n".join(lines[::2]))
    second = text / "second.jsonl"
    second.write_text("\n".join(lines[1::2]))
    arguments = ["--set", "model_name=more", "--set", f"ingest.data_uri={text}/*.jsonl"]
    arguments += ["--set", "ingest.validation_share=0.3"]  # of half the text enough is held out
    workspace.run(*arguments, "--set", "evaluate.margin=50")
    second.unlink()
    run_id = kill_at(workspace, "register", "step_end", *arguments)
    second.write_text("\n".join(lines[1::2]))
    result = workspace.run(*arguments)
    assert statuses(result)["train"] == "reused"
    assert (result["error"], result["promoted"]) == (None, True)
    assert result["run_id"] == result["version"] != run_id
    for key, value in services.up(workspace.home).items():
        monkeypatch.setenv(key, value)
    versions = with_registry(os.environ["NUDGE_REGISTRY_URL"], list_versions("more"))
    data = {each.name: each.properties["data_fingerprint"] for each in versions}
    assert set(data) == {run_id, result["version"]}
    assert len(set(data.values())) == 2
