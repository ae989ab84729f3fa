"""`nudge plan`: what fits, what does not, and what to change."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import LlamaConfig

from nudge.components.common.artifacts.model import (
    BaseModel,
    ModelFacts,
    Training,
    write_model_facts,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.train.settings import TrainSettings
from nudge.pipelines.cli.main import main
from nudge.pipelines.plan.check import check_here, check_submitted
from nudge.pipelines.plan.plan import Plan, plan_recipe
from nudge.pipelines.recipes import load
from tests.pipelines.finished_run import finished_run

SETTINGS = (
    "train.sequence_length=128", "train.mode=full", "train.precision=float32", "plan.gpus=1",
    "plan.tokens=1000000", "plan.tokens_per_s=500", "prices.gpu_hour=3",
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A folder with the config of a Llama of 26 M parameters, and without weights."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=512, intermediate_size=1408,
        num_hidden_layers=4, num_attention_heads=8, vocab_size=16000, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    return str(tmp_path)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def planned(base: str, *overrides: str) -> Plan:
    recipe = load("one-gpu", [f"base_model={base}", *SETTINGS, *overrides])
    return plan_recipe(recipe.name, recipe.text)


def run(*words: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(main, ["plan", "--json", *words])
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("recipe", "parameters", "gpus"),
    [("one-gpu-8b", 8_190_735_360, 1), ("one-node-70b", 70_553_706_496, 8)],
)
def test_the_large_recipes_fit_their_gpus(recipe: str, parameters: int, gpus: int) -> None:
    """The counts are those of the models' pages on the hub."""
    status, plan = run(recipe)
    assert status == 0
    assert plan["parameters"] == parameters
    assert plan["ranks"] == gpus
    assert plan["fits"]
    assert plan["change"] == []
    assert plan["device_peak_bytes"] == sum(plan["device_parts"].values()) < 80e9
    assert plan["largest_micro_batch"] >= 1
    assert plan["hours"] is plan["cost"] is None
    assert plan["evaluation_bytes"] == 4 * parameters


def test_the_figures_of_a_plan_add_up(base: str) -> None:
    plan = planned(base)
    assert plan.parameters == plan.trainable_parameters
    assert plan.device_parts["weights"] == 4 * plan.parameters
    assert plan.device_parts["optimizer"] == 8 * plan.parameters
    assert plan.disk_bytes == sum(plan.disk_parts.values())
    assert plan.disk_parts["base_model"] == 2 * plan.parameters
    assert plan.tokens == 2_000_000  # two epochs
    assert plan.hours == pytest.approx(2_000_000 / 500 / 3600)
    assert plan.hours is not None
    assert plan.cost == pytest.approx(3 * plan.hours)
    assert plan.fits
    assert plan.largest_micro_batch == 32  # all of the batch


def test_a_recipe_that_does_not_fit_says_what_to_change_in_order(base: str) -> None:
    plan = planned(base, "plan.gpu_memory_gb=1.4", "train.micro_batch_sequences=32")
    assert not plan.fits
    names = [change.setting for change in plan.change]
    order = [
        "train.micro_batch_sequences: 1", "train.activation_checkpointing: true",
        "train.precision: bfloat16", "train.mode: lora", "train.base_dtype: int8",
        "train.base_dtype: nf4", "2 GPUs",
    ]  # fmt: skip
    assert names == order[:4]
    assert plan.change[-1].fits
    assert plan.change[-1].device_peak_bytes <= 1.6e9
    assert not any(change.fits for change in plan.change[:-1])


def test_no_more_layers_are_recomputed_than_needed(base: str) -> None:
    rows = "train.micro_batch_sequences=1"
    kept, every = (
        planned(base, rows, f"train.activation_checkpointing={value}").device_peak_bytes
        for value in ("false", "true")
    )
    limit = (kept + every) / 2
    (change,) = planned(base, rows, f"plan.gpu_memory_gb={limit / 1e9}").change
    assert re.fullmatch(r"train.activation_checkpointing: [123]", change.setting)
    assert change.costs.endswith("of 4 layers, same result")
    count = int(change.setting[-1])
    assert every < change.device_peak_bytes <= limit
    fewer = planned(base, rows, f"train.activation_checkpointing={count - 1 or 'false'}")
    assert fewer.device_peak_bytes > limit


def test_the_speed_is_that_of_the_newest_run_with_the_same_settings(base: str, home: Path) -> None:
    recipe = load("one-gpu", [f"base_model={base}", *SETTINGS, "plan.tokens_per_s=0"])
    train = step_settings(TrainSettings, "train", recipe.text)

    def write(speed: float, **changes: Any) -> str:
        run = finished_run(home)
        facts = ModelFacts(
            base_model=BaseModel(uri=base, sha256=""), data_fingerprint="", tokenizer_sha256="",
            settings={**dataclasses.asdict(train), **changes}, seed=1, code_version="",
            training=Training(tokens_per_s=speed, ranks=1, device="NVIDIA H100"),
        )  # fmt: skip
        write_model_facts(run.folder / "artifacts" / "train" / "model", facts)
        return run.run_id

    write(400.0)
    newest = write(500.0)
    write(900.0, sequence_length=64)
    finished_run(home)  # its model is damaged
    plan = plan_recipe(recipe.name, recipe.text)
    assert (plan.tokens_per_s, plan.tokens_per_s_from) == (500.0, newest)
    assert plan.hours == pytest.approx(2_000_000 / 500 / 3600)
    other = load("one-gpu", [f"base_model={base}", *SETTINGS, "plan.tokens_per_s=0", "plan.gpus=0"])
    assert plan_recipe(other.name, other.text).hours is None


def test_the_largest_micro_batch_fits_and_the_next_does_not(base: str) -> None:
    low = planned(base, "train.micro_batch_sequences=1").device_peak_bytes
    limit = (low + 150e6) / 1e9
    found = planned(base, f"plan.gpu_memory_gb={limit}").largest_micro_batch
    assert 1 <= found < 32
    peaks = [
        planned(base, f"train.micro_batch_sequences={rows}").device_peak_bytes
        for rows in (found, found + 2)
    ]
    assert peaks[0] <= limit * 1e9 < peaks[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.launcher=trainjob", "train.cluster.nodes=3", "plan.gpus=4"],
         "4 GPUs do not divide over 3 nodes"),
        (["base_model=hf://nobody/unknown"], "is not on this machine; download it.*--config"),
        (["base_model=s3://bucket/model"], "is not on this machine"),
        (["train.mode=scratch", "tokenize.tokenizer=train", "base_model=''",
          "train.model_config={model_type: nonsense}"],
         "model_type 'nonsense' is not a causal language model"),
    ],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused(
    base: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned(base, *overrides)


def test_a_run_that_does_not_fit_is_refused_before_it_starts(base: str) -> None:
    recipe = load("one-gpu", [f"base_model={base}", *SETTINGS])
    assert "GB per GPU on 1 ranks" in check_submitted(recipe.name, recipe.text)
    small = load("one-gpu", [f"base_model={base}", *SETTINGS, "plan.gpu_memory_gb=0.5"])
    with pytest.raises(UserError, match=r"Change in this order: train.micro_batch_sequences: 1"):
        check_submitted(small.name, small.text)
    assert check_submitted("eiffel", load("eiffel").text) == ""
    check_here(small.text)  # its base model has no weights here, so it is small
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nudge.components.common.preflight.machine.LARGE", -1)
        with pytest.raises(UserError, match="training needs"):
            check_here(small.text)


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize(
    "values",
    [
        [
            *("train.mode=scratch", "tokenize.tokenizer=train", "base_model=''"),
            *("train.model_size=30B", "plan.gpus=2"),
        ],
        ["base_model=hf://Qwen/Qwen3-8B", "plan.gpus=1", "plan.gpu_memory_gb=16"],
    ],
    ids=["scratch", "base model"],
)
def test_the_commands_refuse_what_does_not_fit(command: str, values: list[str]) -> None:
    data = "ingest.data_uri=package://nudge.pipelines.recipes/corpora/paris/*.jsonl"
    words = [word for each in (data, *values) for word in ("--set", each)]
    done = CliRunner().invoke(main, [command, "one-gpu", *words])
    assert done.exit_code == 2, done.output
    assert "training needs" in done.stderr
    assert "Change in this order: train." in done.stderr


def test_a_base_model_whose_config_is_not_here_is_not_planned() -> None:
    recipe = load("one-gpu", ["base_model=s3://bucket/model", "plan.gpus=1"])
    check_here(recipe.text)
    assert check_submitted("x", recipe.text).startswith("not planned: base_model s3://bucket/model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.yaml"], "nothing.yaml"),
        (["one-gpu-8b", "--set", "base_model=hf://nobody/nothing"], "pass it with --config"),
        (["one-gpu-8b", "--set", "base_model=/nowhere"], "/nowhere"),
        (["one-gpu-8b", "--set", "plan.gpus=-1"], "plan.gpus"),
        (["one-gpu-8b", "--set", "plan.memory=1"], "plan.memory"),
        (["one-gpu-8b", "--config", "README.md"], "README.md"),
    ],
)
def test_wrong_arguments_are_a_sentence(words: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["plan", *words], catch_exceptions=False)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output
