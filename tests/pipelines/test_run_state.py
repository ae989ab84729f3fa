"""What a run is known to be from the events of its steps, and what is printed of it."""

import io
import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from nudge.components.common.core.nothing_new import NOTHING_NEW
from nudge.components.common.core.publish import write_manifest
from nudge.pipelines.cli import display
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import history, run_page
from nudge.pipelines.local.result import keep_result, result
from nudge.pipelines.local.run import Run, begin
from nudge.pipelines.recipes import load
from nudge.pipelines.step_state import StepState

METRICS = {
    **{"nats_per_token": 3.0, "token_perplexity": 20.1, "bits_per_byte": 1.25},
    **{"word_perplexity": 400.0, "tokens": 10, "bytes": 40, "words": 8, "documents": 2},
}
PROBE = {
    **{"prompt": "it's in", "target": " Paris", "p_before": 0.3, "p_after": 0.9},
    **{"expect": "rise", "ok": True, "rivals_before": [], "rivals_after": []},
}
ISSUE_KEYS = {
    *("recipe", "run_id", "steps", "metrics", "probes", "model_uri", "registered_model"),
    *("version", "endpoint", "served_model", "report", "promoted"),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return begin(load("eiffel"), tmp_path)


def end(run: Run, name: str, outputs: dict[str, str] | None = None, **results: Any) -> None:
    step = run.steps[name]
    step.apply({"event": "step_start", "time": 1.0})
    values = {"status": "done", "seconds": 2.0, "outputs": outputs or {}, "results": results}
    step.apply({"event": "step_end", **values})


def evaluated(run: Run, promote: bool, incumbent: bool = True) -> None:
    evaluation, report = run.folder / "evaluation.json", run.folder / "made.html"
    verdict = {"promote": promote, "reason": "better by 0.1"}
    metrics = {"base": METRICS, "candidate": METRICS}
    if incumbent:
        metrics["incumbent"] = METRICS
    body = {"verdict": verdict, "metrics": metrics, "probes": [PROBE]}
    write_manifest(evaluation, "nudge.evaluation", 1, body)
    report.write_text("<p>page</p>")
    end(run, "train", {"model": "/somewhere/model"}, steps=3, tokens=30, loss=2.5)
    outputs = {"evaluation": str(evaluation), "report": str(report)}
    end(run, "evaluate", outputs, base_bits_per_byte=1.3, candidate_bits_per_byte=1.25)


def served(run: Run) -> None:
    end(run, "upload", uri="s3://nudge/models/m/v", files=3, bytes=9)
    end(run, "register", registered_model="m", version="v")
    end(
        run, "deploy", endpoint="http://127.0.0.1:1", served_model="m", smoke_prompt="it is",
        smoke_answer=" so",
    )  # fmt: skip


def test_the_recipe_in_a_runs_folder_has_no_credentials(tmp_path: Path) -> None:
    """A run that was interrupted is recognized nevertheless, also one of an older nudge."""
    address = "https://me:canary@files.example/a.txt?sig=canary"
    recipe = load("eiffel", (f"ingest.data_uri={address}",))
    assert "canary" in recipe.text
    run = begin(recipe, tmp_path)
    kept = run.folder / "recipe.yaml"
    assert "canary" not in kept.read_text()
    assert "https://***@files.example/a.txt?***" in kept.read_text()
    run.events.write_text(json.dumps({"step": "upload", "event": "step_start"}) + "\n")
    for text in (kept.read_text(), recipe.text):
        kept.write_text(text)
        run.lock.close()
        again = begin(recipe, tmp_path)
        assert (again.run_id, again.continued) == (run.run_id, True)
        run = again


def test_two_runs_of_one_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    runs = [begin(load("eiffel"), tmp_path) for _ in range(8)]
    assert len({run.folder for run in runs}) == 8


def test_ctrl_c_before_there_is_a_run_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nudge.pipelines.cli.run.load", interrupted)
    ended = CliRunner().invoke(main, ["run"])
    assert (ended.exit_code, ended.stderr) == (130, "stopped\n")


def lines_of(*events: tuple[str, str]) -> list[str]:
    return [json.dumps({"step": step, "event": event}) for step, event in events]


def cut_off(home: Path, *events: tuple[str, str], failed: str = "", kept: bool = False) -> str:
    """A run of eiffel that ended after these events; returns its id."""
    run = begin(load("eiffel"), home, fresh=True)
    run.events.write_text("".join(f"{line}\n" for line in lines_of(*events)))
    if failed:
        run.steps[failed].apply({"event": "step_failed", "time": 1.0, "error": "it burst"})
    if failed or kept:
        keep_result(run)
    run.lock.close()  # as the end of its process does
    return run.run_id


UPLOADED = ("upload", "step_start"), ("upload", "step_end")


@pytest.mark.parametrize(
    "end",
    [
        {"events": UPLOADED[:1]},
        {"events": UPLOADED},
        {"events": (*UPLOADED, ("register", "step_start"), ("deploy", "step_failed"))},
        {"events": (*UPLOADED, ("deploy", "step_failed")), "failed": "deploy"},
        {"events": UPLOADED, "then": (("ingest", "step_start"),)},
        {"events": (*UPLOADED, ("deploy", "step_failed")), "failed": "deploy", "then": ()},
    ],
)
def test_a_run_that_was_cut_off_while_it_published_goes_on(tmp_path: Path, end: Any) -> None:
    then = end.pop("then", None)
    run_id = cut_off(tmp_path, *end.pop("events"), **end)
    assert begin(load("eiffel", ["seed=7"]), tmp_path).run_id != run_id
    if then is not None:  # an earlier continuation ended sooner
        once = begin(load("eiffel"), tmp_path)
        once.events.write_text("".join(f"{line}\n" for line in lines_of(*then)))
        once.lock.close()
    again = begin(load("eiffel"), tmp_path)
    assert (again.run_id, again.continued) == (run_id, True)
    assert not (again.folder / "events.jsonl").exists()  # its events are not shown twice
    # It is at work now, and another one is another run.
    assert begin(load("eiffel"), tmp_path).run_id != run_id


@pytest.mark.parametrize(
    "end",
    [
        {"events": (("train", "step_end"), ("evaluate", "step_start"))},
        {"events": (*UPLOADED, ("deploy", "step_end")), "kept": True},
        {"events": (("upload", "step_failed"),), "failed": "upload"},
    ],
)
def test_any_other_is_begun_anew(tmp_path: Path, end: Any) -> None:
    run_id = cut_off(tmp_path, *end.pop("events"), **end)
    again = begin(load("eiffel"), tmp_path)
    assert (again.run_id != run_id, again.continued) == (True, False)


def test_the_parts_are_not_stopped_under_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would train on, and promote nothing because it cannot know what is served."""
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path))
    cut_off(tmp_path)
    run = begin(load("eiffel"), tmp_path)
    refused = CliRunner().invoke(main, ["services", "down"])
    assert refused.exit_code == 2
    assert f"error: {run.run_id} is active" in refused.output
    run.lock.close()
    down = CliRunner().invoke(main, ["services", "down"])
    assert (down.exit_code, down.output) == (0, "nothing was running\n")


def test_a_run_of_other_code_or_asked_for_anew_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = cut_off(tmp_path, *UPLOADED)
    with monkeypatch.context() as patch:
        patch.setattr("nudge.pipelines.local.run.code_fingerprint", lambda: "other")
        assert begin(load("eiffel"), tmp_path).run_id != run_id
    run_id = cut_off(tmp_path, *UPLOADED)
    assert begin(load("eiffel"), tmp_path, fresh=True).run_id != run_id


def test_a_promoted_run_tells_where_everything_is(run: Run) -> None:
    evaluated(run, promote=True)
    served(run)
    values = keep_result(run)
    assert set(values) >= ISSUE_KEYS
    assert values["promoted"] is True
    assert values["error"] is None
    assert set(values["metrics"]["base"]) == set(METRICS) - {"words"}
    assert values["probes"][0]["p_after"] == 0.9
    assert Path(values["report"]).read_text() == "<p>page</p>"
    assert json.loads((run.folder / "result.json").read_text()) == values


def test_a_figure_that_is_no_finite_number_is_said_to_be_none(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P of a model that is broken; text without spaces has no word perplexity and no row for it."""
    monkeypatch.setitem(METRICS, "word_perplexity", None)
    monkeypatch.setitem(PROBE, "p_after", None)
    evaluated(run, promote=False)
    console = Console(file=io.StringIO(), width=200)
    console.print(display.summary(result(run), run))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("not available") == 1
    assert "word perplexity" not in shown


def test_a_verdict_against_it_is_no_failure(run: Run) -> None:
    evaluated(run, promote=False)
    values = result(run)
    assert (values["promoted"], values["error"]) == (False, None)
    assert values["endpoint"] is None


def test_a_promotion_that_the_engine_skipped_is_an_error(run: Run) -> None:
    """kfp.local takes a condition that it cannot evaluate for false, silently."""
    evaluated(run, promote=True)
    for name in ("upload", "register", "deploy"):
        run.steps[name].status = "skipped"
    values = result(run)
    assert values["promoted"] is False
    assert "the engine skipped upload" in values["error"]


def test_a_better_model_that_was_not_deployed_is_not_promoted(run: Run) -> None:
    evaluated(run, promote=True)
    run.steps["upload"].apply({"event": "step_start", "time": 1.0})
    failed = {"event": "step_failed", "time": 3.5, "error": "the store is full"}
    run.steps["upload"].apply(failed)
    values = result(run)
    assert (values["promoted"], values["error"]) == (False, "the store is full")
    assert run.steps["upload"].seconds == 2.5
    assert set(values) >= ISSUE_KEYS


def test_a_better_model_that_got_no_traffic_says_why(run: Run) -> None:
    """It was compared with a version that is not served any more: no failure, and no promotion."""
    evaluated(run, promote=True)
    served(run)
    why = "v was compared with v1, but v2 has the traffic now"
    end(
        run, "deploy", promoted=False, reason=why, endpoint="http://127.0.0.1:1",
        served_model="m", version="v",
    )  # fmt: skip
    run.exit_status = 0
    values = keep_result(run)
    assert (values["promoted"], values["endpoint"]) == (False, None)
    assert why in values["reason"]
    assert "better by 0.1" in values["reason"]
    console = Console(file=io.StringIO(), width=400)
    console.print(display.summary(values, run))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "│ registered, not promoted" in text
    assert why in text


def test_an_engine_that_fails_before_any_step_is_an_error(run: Run) -> None:
    run.exit_status = 1
    assert result(run)["error"] == f"the pipeline ended with status 1; see {run.log}"
    run.log.write_text(
        "Traceback\n  ...\nModuleNotFoundError: No module named \x1b[96m'kfp'\x1b[0m\n\n"
    )
    assert result(run)["error"] == (
        "the pipeline ended with status 1: ModuleNotFoundError: No module named 'kfp'; see "
        f"{run.log}"
    )


def test_progress_is_taken_in() -> None:
    step = StepState("train")
    step.apply({"event": "step_start", "time": 1.0})
    figures = {"loss": 2.5, "tokens_per_s": 98.0, "eta_s": 12}
    step.apply({"event": "progress", "done": 3, "total": 9, "unit": "steps", "fields": figures})
    assert (step.status, step.done, step.total, step.fields) == ("running", 3, 9, figures)


def test_the_tables_show_what_came_out(run: Run) -> None:
    evaluated(run, promote=True)
    served(run)
    values = keep_result(run)
    console = Console(file=io.StringIO(), width=200)
    console.print(display.summary(values, run))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    text += "\n".join(display.ways_on(values, run, run.folder))
    for part in (
        "/somewhere/model",
        "index.html",
        "http://127.0.0.1:1",
        "nudge rollback --model m",
    ):
        assert part in text
    for part in ("3 steps, 30 tokens", "0.300", "0.900", "' Paris'", "1.25", "report.html", "m v"):
        assert part in text
    assert "it is -> ' so'" in text


def test_a_night_without_new_text_says_what_it_could_not_read(run: Run) -> None:
    end(run, "ingest", new=0, account="read 9, kept 9; dropped: nothing", dropped={})
    assert keep_result(run)["reason"] == NOTHING_NEW
    account = "read 9, kept 6; dropped: 3 not_utf8 (new.jsonl)"
    end(run, "ingest", new=0, account=account, dropped={"not_utf8": 3})
    assert keep_result(run)["reason"] == f"{NOTHING_NEW} ({account})"
    run.lock.close()
    assert history.read_run(run.folder).state == "nothing new"
    shown = io.StringIO()
    Console(file=shown, width=200).print(display.outcome(run, "link"))
    assert "3 not_utf8 (new.jsonl)" in shown.getvalue()


def test_after_the_first_version_there_is_no_way_back(run: Run) -> None:
    evaluated(run, promote=True, incumbent=False)
    served(run)
    lines = "\n".join(display.ways_on(keep_result(run), run, run.folder))
    assert "nudge ask --model m" in lines
    assert "rollback" not in lines
    assert "go back" not in run_page.next_commands(history.read_run(run.folder))


def test_a_refused_run_says_that_nothing_changed(run: Run) -> None:
    evaluated(run, promote=False)
    console = Console(file=io.StringIO(), width=200)
    console.print(display.summary(keep_result(run), run))
    assert "no; what is served has not changed" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_curl_line_survives_a_shell(run: Run, tmp_path: Path) -> None:
    evaluated(run, promote=True)
    served(run)
    home = tmp_path / "it's a home"
    words = shlex.split(display.curl(result(run), "it's in", home))
    assert f"@{home / 'services' / 'endpoint.header'}" in words
    assert "http://127.0.0.1:1/v1/completions" in words
    body = json.loads(words[words.index("-d") + 1])
    assert (body["model"], body["prompt"]) == ("m", "it's in")


@pytest.mark.parametrize("terminal", [True, False])
def test_live_progress_on_a_terminal_and_elsewhere(run: Run, terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    with display.Live(console, run) as live:
        step = run.steps["train"]
        step.apply({"event": "step_start", "time": 1.0})
        figures = {"loss": 2.5, "tokens_per_s": 98.0, "eta_s": 12}
        step.apply({"event": "progress", "done": 3, "total": 9, "unit": "steps", "fields": figures})
        live.show(run)
        live.show(run)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        if terminal:
            live._bars.refresh()  # type: ignore[union-attr]
            shown = console.file.getvalue()  # type: ignore[attr-defined]
            assert "loss 2.5  tokens/s 98  eta_s 12" in shown
        else:
            assert shown == "train: running\n"
        end(run, "train")
        live.show(run)
    assert "done" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_bar_of_unknown_length_is_not_full_and_its_clock_goes_on(run: Run) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with display.Live(console, run) as live:
        step = run.steps["evaluate"]
        step.apply({"event": "step_start", "time": time.time() - 42})
        progress: dict[str, Any] = {"done": 3220, "total": None, "unit": "tokens", "fields": {}}
        step.apply({"event": "progress", **progress})
        live.show(run)
        assert live._bars is not None
        task = live._bars.tasks[live._tasks["evaluate"]]
        assert not task.finished
        assert task.fields["clock"] == "42 s"
        end(run, "evaluate")
        live.show(run)
        assert task.finished
        assert task.fields["clock"] == "2 s"
