"""The facts about the machine that stand beside every figure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nudge.kernels import machine
from tests.bench.results import Measure, publish

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu vme sse2 avx f16c fma avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
"""
EPYC = """processor\t: 0
model name\t: AMD EPYC 7B13
flags\t\t: fpu vme sse2 avx f16c fma avx2 sha_ni
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes sve i8mm bf16
CPU architecture: 8
"""


@pytest.mark.parametrize(
    ("info", "name", "sets"),
    [
        (XEON, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
         "avx avx2 fma avx512f avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"),
        (EPYC, "AMD EPYC 7B13", "avx avx2 fma"),
        (GRAVITON, None, "asimd sve bf16 i8mm"),
        ("", None, ""),
    ],
)  # fmt: skip
def test_the_processor_and_its_instructions(info: str, name: str | None, sets: str) -> None:
    assert machine.instruction_sets(info) == sets.split()
    found = machine.processor(info)
    assert found == name if name else found  # arm64 has no name there


def test_the_library_that_multiplies_is_the_one_that_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "onednn_is_faster", lambda: True)
    assert machine.cpu_products().startswith("oneDNN for float32, oneDNN for bfloat16")
    monkeypatch.setattr(machine, "onednn_is_faster", lambda: False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    shown = machine.cpu_products()
    assert shown.startswith("MKL" if torch.backends.mkl.is_available() else "torch's BLAS")
    assert shown.endswith(", ONEDNN_MAX_CPU_ISA=AVX2)")


def test_every_benchmark_prints_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path))
    publish("x", [Measure("a measure", "s", 1.0)], ["torch"], "a device")
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "bench" / "x.json").read_text())["machine"]
    for name, value in machine.describe().items():
        assert name in printed
        assert value in printed
        assert written[name] == value
    assert written.keys() >= {"processor", "instruction sets", "kernel library", "cores"}
    for path in (Path(__file__).parents[1] / "bench").glob("bench_*.py"):
        assert "publish(" in path.read_text(), path


def test_the_command_prints_them() -> None:
    command = [sys.executable, "-m", "nudge.kernels"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{machine.processor()}: {', '.join(machine.instruction_sets())}" in printed
    assert f"products by {machine.cpu_products()}" in printed
