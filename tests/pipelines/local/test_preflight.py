"""What a recipe needs and this machine lacks is said before anything runs, all of it at once."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nudge.components.common.core.errors import UserError
from nudge.components.common.preflight import machine
from nudge.components.common.preflight.checks import Way
from nudge.components.common.preflight.checks import preflight as preflight_of
from nudge.components.common.preflight.elsewhere import check_elsewhere
from nudge.components.common.preflight.packages import check_packages
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import preflight
from nudge.pipelines.recipes import load
from tests.components.common.clients.test_storage import store_without


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without extras and without a cluster."""
    for name in ("lm_eval", "mlflow", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("KUBERNETES_SERVICE_HOST", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["eiffel", "nightly", "one-gpu", "python-docs"])
def test_a_shipped_recipe_needs_nothing_more(name: str) -> None:
    # A test may run on a machine with too little memory for a micro-batch that suits a GPU.
    preflight.check(load(name, ["train.micro_batch_sequences=1"]).text)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluate.tasks=[quiz]", r"^evaluate\.tasks needs lm-evaluation-harness"),
        ("ingest.engine=ray", r"^ingest\.engine: ray needs Ray, which is not installed"),
        ("tokenize.engine=ray", r"^tokenize\.engine: ray needs Ray, which is not installed"),
        ("deploy.target=kserve", "^no cluster is known here: "),
        ("train.launcher=trainjob", "^no cluster is known here: "),
        ("train.launcher=rayjob", "^no cluster is known here: "),
    ],
)
def test_what_is_not_here_is_named(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        preflight.check(load("eiffel", [override]).text)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["base_model=/nowhere/tower"], "base_model /nowhere/tower: .* does not exist"),
        (
            ["evaluate.guards=[{name: g, uri: nowhere/*.txt}]"],
            "evaluate.guards g: .*nowhere.* has 0 documents with text; fewer than 16",
        ),
        (["evaluate.prompts=[' ']"], "the prompt ' ' has no text"),
    ],
)
def test_a_model_or_text_that_cannot_be_used_is_reported_before_anything_runs(
    overrides: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        preflight.check(load("eiffel", overrides).text)


def test_lora_targets_are_compared_with_the_base_models_files(tiny_model: Path) -> None:
    base = f"base_model={tiny_model}"
    preflight.check(load("eiffel", [base]).text)
    with pytest.raises(UserError, match="this model has no qkv_proj; the linear layers of its"):
        preflight.check(load("eiffel", [base, "train.lora_targets=[o_proj, qkv_proj]"]).text)


def test_a_disk_or_memory_that_is_too_small_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = machine.check_machine
    check(1000, "full", tmp_path / "not" / "there", True)
    with pytest.raises(UserError, match=r"GB free, and a model of 10,000,000,000,000 parameters"):
        check(10**13, "full", tmp_path, True)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 10**9)
    with pytest.raises(UserError, match=r"has 1\.0 GB of memory.*full needs at least 1\.6 GB"):
        check(10**8, "full", tmp_path, True)
    check(10**8, "lora", tmp_path, True)
    check(10**8, "full", tmp_path, False)  # the GPU's memory counts


def test_an_image_without_the_harness_is_found_before_training() -> None:
    with pytest.raises(UserError, match="on a cluster, nudge's own images have it"):
        check_packages("evaluate: {tasks: [quiz]}")
    check_packages("evaluate: {window: 64}")


def test_an_injected_mlflow_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    preflight.check(load("eiffel").text)


def test_a_store_that_cannot_take_the_upload_is_found_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with store_without("conditions") as server:
        monkeypatch.setenv("AWS_S3_ENDPOINT", server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_BUCKET"):
            monkeypatch.setenv(name, "nudge")
        with pytest.raises(UserError, match="refuses a conditional write with a checksum"):
            preflight.check(load("eiffel").text, use_env_services=True)
        preflight.check(load("eiffel").text)
        image = ["upload.target=oci://registry.example/models"]
        preflight.check(load("eiffel", image).text, use_env_services=True)


def test_a_cluster_that_is_known_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: a\n"
        "clusters: [{name: a, cluster: {server: 'http://127.0.0.1:1'}}]\n"
        "contexts: [{name: a, context: {cluster: a, user: a, namespace: mine}}]\n"
        "users: [{name: a, user: {token: t}}]\n"
    )
    monkeypatch.setenv("KUBECONFIG", str(config))
    preflight.check(load("eiffel", ["train.launcher=trainjob"]).text)


def test_nudge_run_starts_nothing_and_says_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    wrong = ["train.launcher=trainjob", "deploy.target=kserve", "evaluate.tasks=[quiz]"]
    settings = [word for each in wrong for word in ("--set", each)]
    ended = CliRunner().invoke(main, ["run", *settings])
    assert ended.exit_code == 2
    lines = ended.stderr.splitlines()
    assert [line.split()[1] for line in lines] == ["evaluate.tasks", "cluster"]
    assert not (tmp_path / "home").exists()


def test_a_cluster_is_not_given_paths_of_this_machine(tmp_path: Path) -> None:
    check_elsewhere(load("eiffel").text)
    check_elsewhere(load("eiffel", ["ingest.data_uri=/not/here", "base_model=s3://b/m"]).text)
    check_elsewhere("train: {mode: scratch}\ningest: {data_uri: s3://b/x}")  # no base_model
    guard = f"evaluate.guards=[{{name: g, uri: {tmp_path}}}]"
    wrong = [f"ingest.data_uri=[s3://b/x, {tmp_path}]", f"base_model={tmp_path}", guard]
    with pytest.raises(UserError) as caught:
        check_elsewhere(load("eiffel", wrong).text)
    keys = [line.split(" is ")[0] for line in str(caught.value).splitlines()]
    assert keys == ["base_model", "ingest.data_uri", "evaluate.guards g"]
    here = f"{{name: a, weight: 1, data_uri: '{tmp_path} s3://b/x'}}"
    mixed = ["ingest.data_uri=''", f"ingest.mix=[{here}, {{name: b, weight: 1, data_uri: s3://b}}]"]
    with pytest.raises(UserError, match=f"^ingest.mix a is {tmp_path}, a path on this machine"):
        check_elsewhere(load("eiffel", mixed).text)
    with pytest.raises(UserError, match="or hf://meta-llama/Llama-3-8B for the model on the hub"):
        check_elsewhere(load("eiffel", ["base_model=meta-llama/Llama-3-8B"]).text)


GUARD = "evaluate.guards=[{name: g, uri: /nowhere/texts}]"
AUTHOR = 'register.author="a\\0b"'


def problems(way: Way, overrides: list[str], **values: Any) -> list[str]:
    """The settings that one way of running reports."""
    recipe = load("eiffel", overrides).text
    try:
        preflight_of(recipe, way, lora_targets=["qkv_proj"], **values)
    except UserError as error:
        return [re.split(r"[ :]", line)[0] for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize(
    ("way", "found"),
    [
        (Way.RUN, ["evaluate.guards", "ingest.engine", "register.author", "train.lora_targets"]),
        (Way.INGEST, ["evaluate.guards", "ingest.engine"]),
        (Way.STEP, ["evaluate.guards", "ingest.engine", "register.author"]),
        (Way.SUBMIT, ["base_model", "register.author"]),
    ],
)
def test_each_way_of_running_reports_all_that_it_can_know(
    tiny_model: Path, way: Way, found: list[str]
) -> None:
    wrong = [GUARD, AUTHOR, "ingest.engine=ray", f"base_model={tiny_model}", "train.mode=lora"]
    assert sorted(problems(way, wrong)) == found
    fine = [f"base_model={tiny_model}", "train.mode=full"]
    assert problems(way, fine) == (["base_model"] if way is Way.SUBMIT else [])


def test_the_first_step_on_a_cluster_checks_the_store_and_serving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "run-1-system-container-impl-1")
    assert problems(Way.STEP, []) == ["no"]  # no cluster is known here
    assert problems(Way.STEP, ["deploy.target=local"]) == []
    with store_without("conditions") as server:
        monkeypatch.setenv("AWS_S3_ENDPOINT", server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_BUCKET"):
            monkeypatch.setenv(name, "nudge")
        assert problems(Way.STEP, ["deploy.target=local"]) == ["the"]  # the object store refuses
        assert problems(Way.STEP, ["deploy.target=local"], publishes=False) == []
        assert problems(Way.INGEST, []) == []


def test_submit_and_ingest_make_their_preflight(tmp_path: Path) -> None:
    for command in (
        ["submit", "--set", f"ingest.data_uri={tmp_path}"],
        ["ingest", "--set", "evaluate.guards=[{name: g, uri: /nowhere/texts}]"],
    ):
        ended = CliRunner().invoke(main, command)
        assert ended.exit_code == 2
        assert re.search(r"that the cluster's pods cannot see|has 0 documents", ended.stderr)
