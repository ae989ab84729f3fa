"""What version 0.1 left on a laptop: its runs, versions, checkpoints, object store and registry.

``state_of_0_1.tar.xz`` is NUDGE_HOME of 0.1 (commit 4fb4de3) after two promoted runs of a tiny
model and a third that was killed after the checkpoint of step 10, with the recipe and the base.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.workspace import Workspace, statuses

STATE = Path(__file__).with_name("state_of_0_1.tar.xz")
FIRST, SECOND, KILLED = "20261201-003238-919c", "20261201-003542-5c46", "20261201-010410-5a8f"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("of-0-1")
    with tarfile.open(STATE) as state:
        state.extractall(folder, filter="data")
    workspace = Workspace(folder, folder / "base", folder / "recipe.yaml")
    yield workspace
    workspace.nudge("services", "down")


def listed(workspace: Workspace, command: str) -> list[dict[str, object]]:
    done = workspace.nudge(command, "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.long
def test_its_runs_and_versions_are_listed(workspace: Workspace) -> None:
    runs = {row["run_id"]: row["state"] for row in listed(workspace, "runs")}
    assert runs == {FIRST: "promoted", SECOND: "promoted", KILLED: "failed"}
    shares = {row["version"]: row["share"] for row in listed(workspace, "models")}
    assert shares == {FIRST: 0, SECOND: 100}


@pytest.mark.long
def test_its_version_is_served_and_rolled_back(workspace: Workspace) -> None:
    done = workspace.nudge("services", "up")
    assert f"serving-tiny@{SECOND}" in done.stdout, done.stderr
    done = workspace.nudge("rollback", "--model", "tiny")
    assert done.returncode == 0, done.stderr
    shares = {row["version"]: row["share"] for row in listed(workspace, "models")}
    assert shares == {FIRST: 100, SECOND: 0}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_its_checkpoint_is_resumed(workspace: Workspace) -> None:
    (left,) = (workspace.home / "checkpoints").glob("*/step-000000010/metrics.jsonl")
    before = left.read_text()
    result = workspace.run("--set", "train.checkpoint_every=10")
    assert statuses(result)["train"] == "done"
    (metrics,) = (workspace.home / "runs" / result["run_id"]).glob("artifacts/**/metrics.jsonl")
    after = metrics.read_text()
    assert after.startswith(before)  # with the seconds that 0.1 took
    assert json.loads(after.splitlines()[-1])["step"] == 40
    assert f"the version served now ({FIRST})" in result["reason"]
