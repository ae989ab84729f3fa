"""What is printed can be copied: an address stays in one piece."""

import io
import math
import os
import subprocess
import sys
import time
import types
from typing import ClassVar

import pytest
from rich.console import Console

from nudge.components.common.core.figures import finite
from nudge.pipelines.cli import display
from nudge.pipelines.step_state import StepState

NAME = "serving-a-model-of-a-long-name@20261126-144205-ab12"
ADDRESS = "http://127.0.0.1:65535"
ROWS = [
    {
        "name": NAME,
        "state": "running",
        "address": ADDRESS,
        "pid": 4194304,
        "resident_mb": 12345,
        "log": "/x/services/serving.log",
    }
]


@pytest.mark.parametrize("columns", [64, 80, 200])
def test_no_address_folds(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    display.parts(ROWS)
    piped = capsys.readouterr().out
    assert any(NAME in line and ADDRESS in line for line in piped.splitlines())
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    display.parts(ROWS)
    shown = capsys.readouterr().out
    assert ADDRESS in shown
    assert "4194304" in shown
    assert columns == 200 or NAME not in shown


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "utf-8"])
def test_a_table_is_shown_in_any_encoding(encoding: str) -> None:
    code = """
from nudge.pipelines.cli.main import main

@main.command()
def shown():
    from nudge.pipelines.cli import display
    from nudge.pipelines.step_state import StepState
    from rich.console import Console
    class Ended:
        steps = {"ingest": StepState("ingest", status="done", results={"prompt": "埃菲尔 é"})}
    Console().print(display.followed(Ended()))
    print("✓ ✗ 埃")

main(["shown"])
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stderr.decode(encoding)) == (0, "")
    shown = done.stdout.decode(encoding)
    mark, crossed, last = ("✓", "✗", "埃") if encoding == "utf-8" else ("+", "x", "?")
    assert f"{mark} done" in shown
    assert shown.splitlines()[-1] == f"{mark} {crossed} {last}"
    assert ("é" in shown) is (encoding != "ascii")


def test_without_a_terminal_one_line_a_minute_says_all_that_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(file=io.StringIO(), width=20)
    run = types.SimpleNamespace(steps={"train": StepState("train")})
    step, clock, wall = run.steps["train"], [100.0], [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: wall[0])
    with display.Live(console, run) as live:  # type: ignore[arg-type]
        step.apply({"event": "step_start", "time": 1000.0})
        for second in range(0, 130, 10):
            clock[0] = 100.0 + second
            wall[0] = 5.0  # somebody sets the clock back
            done = {"done": second, "total": 260, "unit": "steps", "fields": {"loss": 2.5}}
            step.apply({"event": "progress", **done})
            live.show(run)  # type: ignore[arg-type]
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert shown == [
        "train: running",
        "train: running 60 s  60/260 steps (23%)  loss 2.5  about 200 s left",
        "train: running 120 s  120/260 steps (46%)  loss 2.5  about 140 s left",
    ]


@pytest.mark.parametrize("figure", [math.nan, math.inf, None, 1e9, 1e300, 1e-12, 5.0])
def test_no_figure_breaks_the_table_of_a_run(
    figure: float | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    keys = ("bits_per_byte", "token_perplexity", "word_perplexity")
    metrics = {"documents": 16, **dict.fromkeys(keys, figure)}
    probe = {"prompt": "The", "target": " x", "p_before": figure, "p_after": 1e-9, "expect": "rise"}
    values = {
        **dict.fromkeys(("recipe", "run_id", "reason", "report", "model_uri", "version"), ""),
        "metrics": {"base": metrics, "candidate": metrics},
        "probes": [{**probe, "ok": True}],
        "promoted": False,
    }

    class Ended:
        steps: ClassVar = {
            "train": StepState("train", status="done", results={"steps": 1, "loss": figure}),
            "evaluate": StepState(
                "evaluate",
                status="done",
                results={"base_bits_per_byte": figure, "candidate_bits_per_byte": figure},
            ),
        }

    Console().print(display.summary(values, Ended()))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "nan" not in shown.partition("held-out")[2]
    assert "1.0e−09" in shown
    assert ("word perplexity" in shown) is finite(figure)
