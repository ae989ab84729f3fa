"""`nudge run` with a tiny model: all seven steps, then the compiled YAML, then a killed step."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from nudge.components.common.local import guard
from nudge.pipelines.local import services
from tests.end_to_end.conftest import CANARIES, FOREIGN, OWN
from tests.end_to_end.workspace import Workspace, statuses
from tests.local_registry import endpoint_headers
from tests.security.test_canaries import found_in
from tests.security.watch import Watch

COMPILED = Path(__file__).parents[2] / "pipelines" / "compiled" / "train_and_serve.yaml"


def test_all_seven_steps_end_in_a_served_model_that_answers(
    first: dict[str, Any], workspace: Workspace
) -> None:
    assert set(statuses(first).values()) == {"done"}
    assert first["promoted"]
    assert (
        first["metrics"]["candidate"]["bits_per_byte"] < first["metrics"]["base"]["bits_per_byte"]
    )
    assert first["model_uri"].endswith(f"/tiny/{first['version']}")
    body = {"model": first["served_model"], "prompt": "Paris", "max_tokens": 4}
    answer = httpx.post(
        f"{first['endpoint']}/v1/completions",
        json=body,
        headers=endpoint_headers(workspace.home),
        timeout=60,
    )
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"]


def test_no_secret_leaves_the_command(
    watched: tuple[dict[str, Any], Watch, str], workspace: Workspace
) -> None:
    """Not in a file, a page, a log, the output or the list of processes, and not to a process that
    does not need it."""
    _, watch, output = watched
    services_folder = workspace.home / "services"
    credentials = services_folder / "credentials"
    tokens = {path for path in services_folder.rglob("*") if path.suffix in (".token", ".header")}
    # Caddy compares the token itself.
    private = {credentials, *tokens, workspace.home / "gateway" / "tiny" / "caddy.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    kept = [json.loads(credentials.read_text())["AWS_SECRET_ACCESS_KEY"]]
    kept += [path.read_text() for path in tokens if path.suffix == ".token"]
    assert len(kept) == 3
    secrets = [*CANARIES.values(), *kept]
    assert found_in(workspace.home, secrets, but=private) == []
    assert not [secret for secret in secrets if secret in output]
    assert len(watch.arguments) > 5
    listed = "\n".join(word for command in watch.arguments for word in command)
    assert not [secret for secret in secrets if secret in listed]
    assert len(watch.servers) >= 4  # the store, the registry, the gateway and the model
    for seen, secret in (
        (watch.children | watch.servers, FOREIGN.values()),
        (watch.servers, OWN.values()),
    ):
        for arguments, variables in seen:
            found = [name for name, value in variables if value in secret]
            assert found == [], arguments


@pytest.mark.long
def test_what_is_given_is_used_only_when_asked_for(
    first: dict[str, Any], workspace: Workspace, tmp_path: Path
) -> None:
    given = services.up(tmp_path / "elsewhere")
    try:
        own = {**given, "NUDGE_HOME": str(workspace.home)}
        again = workspace.nudge("run", "tiny.yaml", "--json", **own)
        assert (
            "AWS_SECRET_ACCESS_KEY, NUDGE_REGISTRY_URL are set and not used: this run has"
            in again.stderr
        )
        given["NUDGE_HOME"] = str(tmp_path / "home")
        asked = workspace.nudge("run", "tiny.yaml", "--json", "--use-env-services", **given)
        assert asked.returncode == 0, asked.stderr
        result = json.loads(asked.stdout)
        assert (result["promoted"], "not used" in asked.stderr) == (True, False)
        parts = json.loads(workspace.nudge("services", "status", "--json", **given).stdout)
        names = {part["name"].partition("-")[0] for part in parts}
        assert names == {"gateway", "serving"}
        rows = json.loads(workspace.nudge("models", "--json", **given).stdout)
        assert [(row["uri"], row["running"]) for row in rows] == [(result["model_uri"], True)]
    finally:
        services.down(tmp_path / "home")
        services.down(tmp_path / "elsewhere")


def test_the_numbers_can_be_had_from_the_model_folder(first: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(first["model_path"])
    tokenizer = AutoTokenizer.from_pretrained(first["model_path"])
    probe = first["probes"][0]
    ids, p = tokenizer(probe["prompt"])["input_ids"], 1.0
    for token in tokenizer(probe["target"])["input_ids"]:
        p *= torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1)[token].item()
        ids.append(token)
    assert p == pytest.approx(probe["p_after"], rel=1e-3)


def test_the_version_carries_its_lineage(first: dict[str, Any], workspace: Workspace) -> None:
    from model_registry import ModelRegistry

    record = json.loads((workspace.home / "services" / "model-registry.json").read_text())
    token = guard.read_token(workspace.home, services.REGISTRY)
    registry = ModelRegistry(record["address"], author="test", is_secure=False, user_token=token)
    version = registry.get_model_version("tiny", first["version"])
    assert version is not None
    assert version.custom_properties is not None
    assert version.custom_properties["run_id"] == first["run_id"]
    assert len(str(version.custom_properties["data_fingerprint"])) == 64
    artifact = registry.get_model_artifact("tiny", first["version"])
    assert artifact is not None
    assert artifact.uri == first["model_uri"]
    assert (artifact.model_source_kind, artifact.model_source_id) == ("kfp", first["run_id"])


def test_the_compiled_yaml_gives_the_same_and_finished_steps_are_reused(
    first: dict[str, Any], workspace: Workspace
) -> None:
    again = workspace.run("--compiled", str(COMPILED), "--set", "model_name=again")
    reused = {name for name, status in statuses(again).items() if status == "reused"}
    assert reused == {"tokenize", "train", "evaluate"}
    assert again["metrics"] == first["metrics"]
    assert again["promoted"]
    assert again["version"] != first["version"]


@pytest.mark.long
def test_the_same_seed_gives_the_same_bits(first: dict[str, Any], workspace: Workspace) -> None:
    fresh = workspace.run("--fresh")
    # The first one's version is served by now, and this is the same again.
    assert not fresh["promoted"]
    assert "bit for bit" in fresh["reason"]
    assert fresh["metrics"]["incumbent"] == fresh["metrics"]["candidate"]
    weights = [Path(r["model_path"], "model.safetensors").read_bytes() for r in (first, fresh)]
    assert weights[0] == weights[1]


@pytest.mark.long
def test_a_killed_step_fails_the_run_and_the_next_run_goes_on(workspace: Workspace) -> None:
    running = workspace.start("--set", "ingest.split_seed=7", "--set", "train.max_steps=4000")
    pid = _training_pid(workspace)
    os.kill(pid, signal.SIGKILL)
    output, _ = running.communicate(timeout=120)
    result = json.loads(output)
    assert running.returncode == 1
    assert "train" in result["error"]
    assert statuses(result)["tokenize"] in ("done", "reused")  # the seed changes no tokens
    assert statuses(result)["upload"] == "skipped"
    ended = workspace.run("--set", "ingest.split_seed=7", "--set", "evaluate.margin=50")
    assert statuses(ended)["tokenize"] == "reused"
    assert statuses(ended)["train"] == "done"


def _training_pid(workspace: Workspace) -> int:
    import psutil

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for events in (workspace.home / "runs").glob("*/events.jsonl"):
            text = events.read_text()
            if '"step": "train", "event": "progress"' in text and "step_end" in text:
                for process in psutil.process_iter(["cmdline"]):
                    command = " ".join(process.info["cmdline"] or [])
                    alive = (
                        f"{events.parent.name}/" in command and "--function_to_execute" in command
                    )
                    if alive and "python" in command and not command.startswith("sh"):
                        return int(process.pid)
        time.sleep(0.2)
    raise AssertionError("no training process was seen")


def test_wrong_arguments_say_what_is_wrong(workspace: Workspace) -> None:
    for arguments, message in (
        (["run", "eifel"], "did you mean 'eiffel'"),
        (["run", "tiny.yaml", "--set", "train.epoch=2"], "did you mean 'epochs'"),
        (["run", "tiny.yaml", "--set", "train.epochs=many"], "train.epochs = 'many'"),
    ):
        ended = workspace.nudge(*arguments)
        assert ended.returncode == 2
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_missing_base_model_ends_cleanly(workspace: Workspace) -> None:
    ended = workspace.nudge("run", "tiny.yaml", "--json", "--set", "base_model=/nowhere")
    assert ended.returncode == 2
    assert "base_model /nowhere: /nowhere does not exist" in ended.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = "[m for m in ('torch', 'kfp', 'boto3', 'rich') if m in sys.modules]"
    code = f"import sys, nudge.pipelines.cli.main; print({heavy})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
