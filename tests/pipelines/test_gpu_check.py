"""`nudge gpu-check`: its checks run on a CPU, find faults, and survive whatever ends a process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from nudge.components.train.output import exported_weights
from nudge.kernels import fused_linear_cross_entropy
from nudge.kernels.softmax_loss import loss_and_gradient
from nudge.pipelines.cli.main import main
from nudge.pipelines.gpu_check import catalog, kernel, speed, training
from nudge.pipelines.gpu_check.checks import Here, Skipped
from nudge.pipelines.gpu_check.page import render
from nudge.pipelines.gpu_check.run import PAGE, RESULT
from tests.pages import browser, look

UNNEEDED = ("kfp", "pytest", "boto3", "kubernetes", "docker", "fastapi", "ray", "mlflow", "click")
"""Packages of other extras, which must not be needed where checks run."""
BLOCKED = f"""
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in {UNNEEDED!r} else found(name, *rest)
)
"""
FAULTS = """
import os, sys, time, types
facts = types.ModuleType("nudge.pipelines.gpu_check.facts")
facts.machine = lambda device: {"facts": {"torch": "9.9", "processor": "a CPU"}, "gpu": False}
sys.modules[facts.__name__] = facts
from nudge.pipelines.gpu_check import catalog
from nudge.pipelines.gpu_check.checks import Check, Skipped

def ends(here):
    print("the last words", flush=True)
    os._exit(7)

def fails(here):
    raise AssertionError("the loss is 3, but eager's is 2")

def breaks(here):
    return {}["a key"]

def skips(here):
    raise Skipped("needs two GPUs")

def lacks(here):
    import bitsandbites

def sleeps(here):
    time.sleep(600)

runs = [lambda here: {"calls": 3}, ends, fails, breaks, skips, lacks, sleeps, lambda here: {}]
found = {name: Check(name, "T " + name, run, 1.0) for name, run in zip(catalog.NAMES, runs)}
catalog.check_named = found.__getitem__
catalog.NAMES = catalog.NAMES[: len(runs)]
"""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, *options: str) -> Result:
    """Run the command; its workers execute ``code`` first."""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return CliRunner().invoke(main, ["gpu-check", "--out", str(tmp_path / "out"), *options])


def ended(tmp_path: Path) -> dict[str, dict[str, Any]]:
    values = json.loads((tmp_path / "out" / RESULT).read_text())
    return {each["name"]: each for each in values["checks"]}


def test_checks_run_on_a_cpu_without_the_packages_of_other_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("kernel-loads", "kernel-masked", "train-lora-float32")
    only = [word for name in (*names, "train-resume-full") for word in ("--only", name)]
    result = run(tmp_path, monkeypatch, BLOCKED, "--device", "cpu", *only)
    assert result.exit_code == 0, result.output
    assert "passed  train-lora-float32" in result.output
    found = ended(tmp_path)
    assert [each["state"] for each in found.values()] == ["skipped", *["passed"] * 3]
    assert found["kernel-loads"]["message"] == "needs a GPU"
    assert found["train-resume-full"]["figures"] == {"from": "step-000000004", "same bits": "yes"}
    values = json.loads((tmp_path / "out" / RESULT).read_text())
    assert (values["passed"], values["failed"], values["skipped"]) == (3, 0, 1)
    assert values["machine"].keys() >= {"processor", "instruction sets", "kernel library", "torch"}
    assert "All 3 checks passed" in (tmp_path / "out" / PAGE).read_text()


def test_no_fault_of_one_check_hides_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = [word for name in catalog.NAMES[:8] for word in ("--only", name)]
    result = run(tmp_path, monkeypatch, FAULTS, "--device", "cpu", *only)
    assert result.exit_code == 1, result.output
    found = list(ended(tmp_path).values())
    assert [each["state"] for each in found] == [
        "passed", "failed", "failed", "failed", "skipped", "skipped", "failed", "passed",
    ]  # fmt: skip
    works, dies, fails, breaks, skips, lacks, sleeps, _ = found
    assert works["figures"] == {"calls": 3}
    assert dies["message"] == "the process ended with status 7 during this check"
    assert "the last words" in dies["detail"]
    assert fails["message"] == "the loss is 3, but eager's is 2"
    assert breaks["message"] == "KeyError: 'a key'"
    assert "in breaks" in breaks["detail"]
    assert skips["message"] == "needs two GPUs"
    assert lacks["message"].startswith("needs the Python package bitsandbites, which is not inst")
    assert sleeps["message"] == "no result after 1 s, so it was stopped"
    page = (tmp_path / "out" / PAGE).read_text()
    assert "4 of 6 checks failed" in page
    assert "nudge gpu-check --device cpu --only kernel-calls-bfloat16" in page


def test_a_worker_that_dies_after_its_last_check_loses_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = FAULTS + "\nimport atexit\natexit.register(os._exit, 9)\n"
    result = run(tmp_path, monkeypatch, dies, "--device", "cpu", "--only", catalog.NAMES[0])
    assert result.exit_code == 0, result.output
    assert [each["state"] for each in ended(tmp_path).values()] == ["passed"]


def test_when_no_check_could_run_the_status_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path, monkeypatch, FAULTS, "--device", "cpu", "--only", catalog.NAMES[4])
    assert result.exit_code == 2, result.output
    assert [each["state"] for each in ended(tmp_path).values()] == ["skipped"]
    assert "No check could run here" in (tmp_path / "out" / PAGE).read_text()


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, monkeypatch, FAULTS, "--only", "kernel-loads")
    assert result.exit_code == 2
    assert "torch 9.9 sees no GPU" in result.output
    assert "`nudge gpu-check --device cpu` runs what a CPU can" in result.output
    assert not (tmp_path / "out").exists()


def test_a_broken_torch_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import sys\nsys.modules['torch'] = None"
    result = run(tmp_path, monkeypatch, broken, "--device", "cpu")
    assert result.exit_code == 2
    assert "the checks cannot start (status 1)" in result.output
    assert "import of torch halted" in result.output


def test_an_unknown_name_is_refused() -> None:
    result = CliRunner().invoke(main, ["gpu-check", "--only", "train-lorra"])
    assert result.exit_code == 2
    assert "no check begins with 'train-lorra': did you mean 'train-lora-nf4'" in result.output


def test_every_check_is_in_the_catalog_in_its_order() -> None:
    made = (*kernel.CHECKS, *training.CHECKS, *speed.CHECKS, *kernel.SANITIZERS)
    assert tuple(each.name for each in made) == catalog.NAMES
    assert all(catalog.check_named(each.name) is each for each in made)
    listed = CliRunner().invoke(main, ["gpu-check", "--list"]).output.split()
    assert tuple(listed) == catalog.NAMES


HERE = Here("cpu", Path())


def test_kernel_checks_pass_and_find_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.random_calls(HERE, torch.bfloat16, range(12))
    right: Any = loss_and_gradient

    def wrong(logits: torch.Tensor, *rest: Any) -> None:
        right(logits, *rest)
        if rest[-1]:
            logits[0] *= 1.02

    monkeypatch.setattr(f"{kernel.__name__}.loss_and_gradient", wrong)
    with pytest.raises(AssertionError, match=r"call \d+ on path auto"):
        kernel.random_calls(HERE, torch.float32, range(12))
    loss: Any = fused_linear_cross_entropy
    monkeypatch.setattr(
        f"{kernel.__name__}.fused_linear_cross_entropy",
        lambda *args, **more: 1.001 * loss(*args, **more),
    )
    for check in (kernel.options, kernel.masked_rows):
        with pytest.raises(AssertionError):
            check(HERE)
    with pytest.raises(Skipped, match="needs a GPU"):
        kernel.no_waiting(HERE)


def test_an_export_without_its_adapters_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported_weights._Tensors, "_part", lambda self, stem, part: None)
    with pytest.raises(AssertionError, match="the exported model's validation loss is"):
        training.trains(Here("cpu", tmp_path), "lora", "float32")


def test_the_table_compares_with_eager_and_the_products() -> None:
    small = speed.Shape("small", 64, 32, 512, "float32")
    row, shares = speed.measured(small, gpu=False, rounds=1)
    assert row.shape == "N=64 D=32 V=512 float32"
    assert min(row.ours, row.eager, row.products) > 0
    assert row.ours_memory is None
    assert [each["percent"] for each in shares] == [0, 50, 70, 90]


def report() -> dict[str, Any]:
    """A report with everything that the page can show."""
    check = {"title": "A check", "detail": "", "seconds": 1.23, "figures": {}, "message": ""}
    row = {
        "name": "Llama-3 8B", "shape": "N=8192 D=4096 V=128256 bfloat16", "ours": 0.0321,
        "eager": 0.0654, "products": 0.0289, "ours_memory": 3e8, "eager_memory": None,
    }  # fmt: skip
    shares = [{"percent": p, "seconds": 0.03 * (100 - p) / 100} for p in (0, 50, 70, 90)]
    table = {"rows": [row], "masked": [{"name": "Llama-3 8B", "shares": shares}]}
    return {
        "device": "gpu", "started": "2026-11-30T21:00:00+00:00", "seconds": 312.4,
        "passed": 2, "failed": 1, "skipped": 1,
        "machine": {"GPU": "An accelerator", "processor": "A CPU", "kernel library": "x" * 300},
        "checks": [
            {**check, "name": "kernel-loads", "state": "passed", "figures": {"calls": 3}},
            {**check, "name": "train-full-float32", "state": "failed", "detail": "line\n" * 40,
             "message": "<script>alert(1)</script> the loss is \x1b[2J nan " + "y" * 400},
            {**check, "name": "kernel-memcheck", "state": "skipped", "message": "no sanitizer"},
            {**check, "name": "speed-table", "state": "passed",
             "figures": {**table, "left_out": ["Gemma-2 2B: not enough GPU memory"]}},
        ],
    }  # fmt: skip


def test_the_page_answers_what_failed_and_why(tmp_path: Path) -> None:
    text = render(report())
    assert "<script>alert" not in text
    assert "\x1b" not in text
    for shown in ("1 of 3 checks failed", "32.1 ms", "0.49", "90 %", "286 MiB", "70 % masked"):
        assert shown in text, shown
    path = tmp_path / "page.html"
    path.write_text(text)
    with browser() as opened:
        for width, scheme in ((390, "dark"), (1200, "light")):
            page, faults = look(opened, path, width, scheme)
            assert faults == []
            assert page.locator("h1").inner_text() == "1 of 3 checks failed"
