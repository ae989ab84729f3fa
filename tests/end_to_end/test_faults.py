"""`nudge run` when it is not promoted, killed, doubled or given what is no language model."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nudge.components.common.core import guard
from nudge.pipelines.cli.display import curl
from nudge.pipelines.local import services

NUDGE = str(Path(sys.executable).parent / "nudge")
RECIPE = str(Path(__file__).parent / "tiny.yaml")


class Place:
    """A folder with services of its own, and `nudge` in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.home = folder / "home"

    def command(self, *arguments: str) -> list[str]:
        return [NUDGE, "run", RECIPE, "--json", "--set", f"base_model={self.model}", *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env={**os.environ, "NUDGE_HOME": str(self.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs ignore it, and hand that on.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        running = self.start(*arguments)
        output, errors = running.communicate(timeout=400)
        assert running.returncode == status, errors
        assert "Traceback" not in errors
        return dict(json.loads(output))

    def folders(self) -> set[Path]:
        return set((self.home / "runs").glob("*"))

    def page(self, result: dict[str, Any]) -> str:
        return (self.home / "runs" / result["run_id"] / "summary.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("faults"), tiny_model)
    environment = {**os.environ, "NUDGE_HOME": str(place.home)}

    def services(what: str) -> None:
        subprocess.run([NUDGE, "services", what], env=environment, check=True, capture_output=True)

    services("up")  # else they would belong to the first run, and outlive it
    yield place
    services("down")


@pytest.fixture(scope="module")
def first(place: Place) -> dict[str, Any]:
    return place.run()


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in result["steps"]}


def eventually(what: Callable[[], Any], timeout_s: float = 100) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come true")


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


PROMPT = "Once upon a time"


def test_what_was_printed_works(place: Place, first: dict[str, Any]) -> None:
    answer = subprocess.run(
        shlex.split(curl(first, PROMPT, place.home)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(answer.stdout)["choices"][0]["text"]
    assert "<html" in Path(first["report"]).read_text()
    page = place.page(first)
    assert first["endpoint"] in page
    assert first["model_uri"] in page


def test_the_runs_model_points_back_at_its_version(place: Place, first: dict[str, Any]) -> None:
    (path,) = (place.home / "runs" / first["run_id"]).rglob("register/executor_output.json")
    (model,) = json.loads(path.read_text())["artifacts"]["registered"]["artifacts"]
    told = model["metadata"]
    assert told["registeredModelName"] == first["registered_model"]
    assert told["modelVersionName"] == first["version"]
    assert told["registeredModelId"]
    assert told["modelVersionId"]
    assert told["modelRegistryName"]


def test_what_is_not_better_changes_nothing(place: Place, first: dict[str, Any]) -> None:
    result = place.run("--set", "evaluate.margin=50")
    assert (result["promoted"], result["error"], result["endpoint"]) == (False, None, None)
    assert [statuses(result)[name] for name in ("train", "upload", "register", "deploy")] == [
        "reused",
        *["skipped"] * 3,
    ]
    assert f"Nothing was promoted: {result['reason']}" in place.page(result)
    subprocess.run(
        shlex.split(curl(first, PROMPT, place.home)), check=True, capture_output=True, timeout=60
    )


def test_what_is_no_causal_language_model_is_refused(place: Place, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=16, vocab_size=300)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(place.model).save_pretrained(tmp_path)
    result = place.run("--set", f"base_model={tmp_path}", status=1)
    assert "is BertModel, not a causal language model" in result["error"]
    assert f"It failed in `tokenize`: {result['error']}" in place.page(result)


def test_a_version_that_another_run_has_is_not_taken_for_ours(
    place: Place, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is registered of an earlier run is no success of one that failed."""
    from nudge.components.summary.summary import summary

    record = json.loads((place.home / "services" / "model-registry.json").read_text())
    token = guard.token_file(place.home, services.REGISTRY)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    page = place.folder / "page.md"
    outcome = {"state": "FAILED", "task": "train", "error": "it burst", "page": page}
    for run_id, registered in ((first["run_id"], True), ("another", False)):
        told = {"version": first["version"], "run_id": run_id, **outcome}
        found = summary("tiny", record["address"], **told)
        assert found["registered"] is registered
        assert ("Nothing was promoted" in page.read_text()) is not registered
    assert "It failed in `train`: it burst" in page.read_text()


@pytest.mark.long
def test_two_runs_at_once_keep_to_their_own_folders(place: Place) -> None:
    """Both finish the same steps with the same inputs, so they also meet in the reuse store."""
    running = [
        place.start("--set", "seed=5", "--set", f"model_name=twin-{number}") for number in range(2)
    ]
    ended = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    one, other = (json.loads(output) for output, _ in ended)
    assert one["run_id"] != other["run_id"]
    assert one["model_uri"] != other["model_uri"]
    assert one["metrics"] == other["metrics"]
    for result in (one, other):
        folder = place.home / "runs" / result["run_id"]
        assert Path(result["model_path"]).is_relative_to(folder)
        assert f"run {result['run_id']}: succeeded" in place.page(result).lower()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ending_the_command_ends_its_steps_and_the_next_run_goes_on(
    place: Place, number: signal.Signals
) -> None:
    endless = ["--set", f"seed={20 + number}", "--set", "train.max_steps=100000"]
    before = place.folders()
    running = place.start(*endless, "--set", "train.epochs=1000")
    (folder,) = eventually(lambda: place.folders() - before)
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
    kept = place.home / "reuse" / "train"
    assert all((path / "result.json").is_file() for path in kept.glob("[!.]*"))
    if number == signal.SIGKILL:
        result = place.run("--set", f"seed={20 + number}", "--set", "evaluate.margin=50")
        assert statuses(result)["tokenize"] == "reused"
        assert statuses(result)["train"] == "done"
