"""`nudge run` when it is not promoted, killed, doubled or given what is no language model."""

import json
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from nudge.components.common.local import guard
from nudge.pipelines.cli.display import curl
from nudge.pipelines.local import services
from tests.end_to_end.workspace import Workspace, eventually, statuses


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


PROMPT = "Once upon a time"


def test_what_was_printed_works(workspace: Workspace, first: dict[str, Any]) -> None:
    answer = subprocess.run(
        shlex.split(curl(first, PROMPT, workspace.home)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(answer.stdout)["choices"][0]["text"]
    assert "<html" in Path(first["report"]).read_text()
    page = workspace.page(first)
    assert first["endpoint"] in page
    assert first["model_uri"] in page


def test_the_runs_model_points_back_at_its_version(
    workspace: Workspace, first: dict[str, Any]
) -> None:
    (path,) = (workspace.home / "runs" / first["run_id"]).rglob("register/executor_output.json")
    (model,) = json.loads(path.read_text())["artifacts"]["registered"]["artifacts"]
    metadata = model["metadata"]
    assert metadata["registeredModelName"] == first["registered_model"]
    assert metadata["modelVersionName"] == first["version"]
    assert metadata["registeredModelId"]
    assert metadata["modelVersionId"]
    assert metadata["modelRegistryName"]


def test_what_is_not_better_changes_nothing(workspace: Workspace, first: dict[str, Any]) -> None:
    result = workspace.run("--set", "evaluate.margin=50")
    assert (result["promoted"], result["error"], result["endpoint"]) == (False, None, None)
    assert [statuses(result)[name] for name in ("train", "upload", "register", "deploy")] == [
        "reused",
        *["skipped"] * 3,
    ]
    assert f"Nothing was promoted: {result['reason']}" in workspace.page(result)
    subprocess.run(
        shlex.split(curl(first, PROMPT, workspace.home)),
        check=True,
        capture_output=True,
        timeout=60,
    )


def test_what_is_no_causal_language_model_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=16, vocab_size=300)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(workspace.model).save_pretrained(tmp_path)
    before = workspace.folders()
    refused = workspace.nudge("run", "tiny.yaml", "--json", "--set", f"base_model={tmp_path}")
    assert refused.returncode == 2
    assert "is BertModel, not a causal language model" in refused.stderr
    assert workspace.folders() == before


def test_a_version_that_another_run_has_is_not_taken_for_ours(
    workspace: Workspace, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is registered of an earlier run is no success of one that failed."""
    from nudge.components.summary.summary import summary

    record = json.loads((workspace.home / "services" / "model-registry.json").read_text())
    token = guard.token_file(workspace.home, services.REGISTRY)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    page = workspace.folder / "page.md"
    outcome = {"state": "FAILED", "task": "train", "error": "it burst", "page": page}
    for run_id, registered in ((first["run_id"], True), ("another", False)):
        arguments = {"version": first["version"], "run_id": run_id, **outcome}
        found = summary("tiny", record["address"], **arguments)
        assert found["registered"] is registered
        assert ("Nothing was promoted" in page.read_text()) is not registered
    assert "It failed in `train`: it burst" in page.read_text()


@pytest.mark.long
def test_two_runs_at_once_keep_to_their_own_folders(workspace: Workspace) -> None:
    """Both finish the same steps with the same inputs, so they also meet in the reuse store."""
    running = [
        workspace.start("--set", "seed=5", "--set", f"model_name=twin-{number}")
        for number in range(2)
    ]
    ended = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    one, other = (json.loads(output) for output, _ in ended)
    assert one["run_id"] != other["run_id"]
    assert one["model_uri"] != other["model_uri"]
    assert one["metrics"] == other["metrics"]
    for result in (one, other):
        folder = workspace.home / "runs" / result["run_id"]
        assert Path(result["model_path"]).is_relative_to(folder)
        assert f"run {result['run_id']}: succeeded" in workspace.page(result).lower()


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGINT]
)
def test_ending_the_command_ends_its_steps_and_the_next_run_goes_on(
    workspace: Workspace, number: signal.Signals
) -> None:
    endless = ["--set", f"seed={20 + number}", "--set", "train.max_steps=100000"]
    before = workspace.folders()
    running = workspace.start(*endless, "--set", "train.epochs=1000")
    (folder,) = eventually(lambda: workspace.folders() - before)
    events = folder / "events.jsonl"
    eventually(lambda: events.exists() and '"train", "event": "progress"' in events.read_text())
    family = psutil.Process(running.pid).children(recursive=True)
    assert len(family) >= 2
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    if number == signal.SIGINT:
        assert [each for each in family if runs(each)] == []
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    if number == signal.SIGINT:
        assert running.returncode == 130
        assert "finished steps are kept" in errors
    # A half-written model is visible to nobody: neither in the run's folder nor for reuse.
    assert list(folder.rglob("train/model")) == []
    kept = workspace.home / "reuse" / "train"
    assert all((path / "result.json").is_file() for path in kept.glob("[!.]*"))
    if number == signal.SIGKILL:
        result = workspace.run("--set", f"seed={20 + number}", "--set", "evaluate.margin=50")
        assert statuses(result)["tokenize"] == "reused"
        assert statuses(result)["train"] == "done"
