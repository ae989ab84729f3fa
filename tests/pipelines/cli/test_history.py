"""`nudge runs`, `nudge logs` and the page of a run: whatever became of it, it is in the list."""

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from nudge.components.common.core.errors import UserError
from nudge.pipelines import api
from nudge.pipelines.cli.history import _list, spark
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import history
from nudge.pipelines.local.run import Run, begin
from nudge.pipelines.recipes import load
from tests.pages import browser, look
from tests.pipelines.finished_run import finished_run


def nudge(*arguments: object, status: int = 0, text: str = "") -> Result:
    command = [str(each) for each in arguments]
    done = CliRunner().invoke(main, command, input=text, catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    """A promoted run, a refused one, one that failed, and one whose command was killed."""
    home = tmp_path / "home"
    monkeypatch.setenv("NUDGE_HOME", str(home))
    found = {
        "promoted": finished_run(home, 1.2),
        "not better": finished_run(home, 1.4, promoted=False, settings=("train.epochs=7",)),
        "failed": finished_run(home, failed="train"),
        "interrupted": begin(load("eiffel"), home, fresh=True),
    }
    found["interrupted"].lock.close()
    return found


def test_every_run_is_listed_with_how_it_ended(four: dict[str, Run]) -> None:
    rows = {row["run_id"]: row for row in json.loads(nudge("runs", "--json").stdout)}
    assert {rows[run.run_id]["state"]: state for state, run in four.items()} == {
        state: state for state in four
    }
    promoted = rows[four["promoted"].run_id]
    assert (promoted["bits_per_byte"], promoted["version"]) == (1.2, four["promoted"].run_id)
    assert promoted["difference"] == pytest.approx(-0.1)
    assert "it burst" in rows[four["failed"].run_id]["reason"]
    shown = nudge("runs").stdout
    assert all(run.run_id in shown for run in four.values())
    only = json.loads(nudge("runs", "--state", "failed", "--json").stdout)
    assert [row["run_id"] for row in only] == [four["failed"].run_id]
    assert "did you mean 'promoted'" in nudge("runs", "--state", "promote", status=2).stderr
    assert json.loads(nudge("runs", "--recipe", "other", "--json").stdout) == []


def test_a_list_of_80_columns_breaks_nothing_but_names() -> None:
    run = history.PastRun("20261201-040406-6040", Path("x"), "interrupted", "a-long-recipe")
    run = replace(run, seconds=754, bits_per_byte=2.0231, difference=-1.575)
    file = io.StringIO()
    Console(file=file, width=80).print(_list([run]))
    shown = file.getvalue()
    for part in (run.run_id, "interrupted", "12 min 34 s", "2.0231", "-1.5750", "bits/byte"):
        assert part in shown, shown


def test_a_run_that_waited_says_what_a_person_decided(four: dict[str, Run]) -> None:
    folder = four["promoted"].folder
    path = folder / "result.json"
    waiting = {**json.loads(path.read_text()), "promoted": False, "awaiting_approval": True}
    path.write_text(json.dumps(waiting))
    assert history.read_run(folder).state == "awaiting approval"
    assert "nudge approve" in nudge("runs", "show", folder.name).stdout
    history.note_decision(folder, "rejected", "ann@desk", "2026-01-02T03:04:05+00:00")
    shown = nudge("runs", "show", folder.name).stdout
    assert "rejected by ann@desk at 2026-01-02" in shown
    assert "nudge approve" not in shown
    assert "nudge promote" not in shown
    assert "rejected" in nudge("runs", "--state", "rejected").stdout
    (folder / "decision.json").write_bytes(b"\0\0")
    assert history.read_run(folder).state == "awaiting approval"


def test_an_active_run_says_so(four: dict[str, Run]) -> None:
    active = begin(load("eiffel"), four["failed"].folder.parents[1], fresh=True)
    active.events.write_text('{"time": 1, "step": "ingest", "event": "step_start"}\n{"tim')
    (row,) = [r for r in api.runs() if r.run_id == active.run_id]
    assert (row.state, row.reason) == ("running", "in ingest")
    refused = nudge("runs", "delete", active.run_id, "--yes", status=2)
    assert "is active; stop it first" in refused.stderr
    active.lock.close()


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if (tag, name) == ("a", "href")]


@pytest.mark.parametrize("state", ["promoted", "not better"])
def test_a_page_links_the_reports_of_three_steps(four: dict[str, Run], state: str) -> None:
    folder = four[state].folder
    links = Links()
    links.feed((folder / "index.html").read_text())
    assert links.found == ["report.html", "train.html", "ingest.html"]
    for link, step in zip(links.found, ("evaluate", "train", "ingest"), strict=True):
        assert f"{step} report" in (folder / link).read_text()


@pytest.mark.parametrize("state", ["promoted", "not better", "failed"])
def test_a_page_fits_a_telephone_and_a_desk(four: dict[str, Run], state: str) -> None:
    with browser() as opened:
        for width, scheme in ((390, "dark"), (1200, "light")):
            page, faults = look(opened, four[state].folder / "index.html", width, scheme)
            assert faults == []
            heads = page.locator("thead th").evaluate_all(
                "all => all.map(e => [e.innerText, e.getClientRects()[0].height])"
            )
            assert len({height for _, height in heads}) == 1
            assert all(height < 40 for _, height in heads), f"a word is broken: {heads}"


def test_a_page_of_a_killed_run_shows_nothing_as_running(four: dict[str, Run]) -> None:
    folder = four["interrupted"].folder
    (folder / "events.jsonl").write_text(json.dumps({"step": "train", "event": "step_start"}))
    shown = nudge("runs", "show", folder.name).stdout
    page = (folder / "index.html").read_text()
    for text in (shown, page):
        assert "stopped" in text
        assert "not begun" in text
        assert "running" not in text
        assert "waiting" not in text


def test_the_log_on_a_page_is_that_of_the_steps(four: dict[str, Run]) -> None:
    nudge("runs", "show", four["failed"].run_id)
    page = (four["failed"].folder / "index.html").read_text()
    assert "train: it burst" in page
    assert "executor_input" not in page


def test_show_says_what_to_do_next(four: dict[str, Run]) -> None:
    shown = nudge("runs", "show", four["promoted"].run_id).stdout
    for part in ("nudge ask --model m", "nudge rollback --model m", "index.html", "train/model"):
        assert part in shown
    failed = nudge("runs", "show", four["failed"].run_id[-4:]).stdout
    assert f"nudge logs {four['failed'].run_id}" in failed
    last = max(run.run_id for run in four.values())
    assert last in nudge("runs", "show").stdout
    values = json.loads(nudge("runs", "show", four["not better"].run_id, "--json").stdout)
    assert values["result"]["metrics"]["candidate"]["bits_per_byte"] == 1.4
    with pytest.raises(UserError, match="no single run 'nope'"):
        history.find(four["failed"].folder.parents[1], "nope")


def test_compare_shows_what_differs(four: dict[str, Run]) -> None:
    names = [four[state].run_id for state in ("promoted", "not better")]
    values = json.loads(nudge("runs", "compare", *names, "--json").stdout)
    assert values["settings"] == {"train.epochs": [0.55, 7.0]}
    assert values["outcome"]["bits_per_byte"] == [1.2, 1.4]
    assert values["outcome"]["base_bits_per_byte"] == [1.3, 1.3]
    assert values["curves"][0][0] == [1, 2.95]
    shown = nudge("runs", "compare", *names).stdout
    assert "train.epochs" in shown
    assert "train.mode" not in shown
    assert "name two or more" in nudge("runs", "compare", names[0], status=2).stderr
    assert spark([1.0, 0.5, 0.0], 0.0, 1.0) == "█▅▁"


def test_delete_asks_first(four: dict[str, Run]) -> None:
    run = four["failed"]
    nudge("runs", "delete", run.run_id, text="n\n")
    assert run.folder.is_dir()
    nudge("runs", "delete", run.run_id, text="y\n")
    assert not run.folder.exists()
    assert run.run_id not in nudge("runs", "--json").stdout


def test_logs_are_those_of_one_step(four: dict[str, Run]) -> None:
    run_id = four["failed"].run_id
    assert nudge("logs", run_id, "train").stdout == "train: it burst\n"
    nudge("runs", "delete", four["interrupted"].run_id, "--yes")
    assert nudge("logs", "train").stdout == "train: it burst\n"
    whole = nudge("logs", run_id).stdout
    assert whole == "== ingest\nreading the text\n== train\ntrain: it burst\n"
    assert "executor_input" in nudge("logs", run_id, "train", "--raw").stdout


def test_the_python_interface_is_typed(four: dict[str, Run]) -> None:
    runs = {run.run_id: run for run in api.runs()}
    promoted = runs[four["promoted"].run_id]
    assert promoted.promoted
    assert promoted.bits_per_byte == 1.2
    assert promoted.endpoint == "http://127.0.0.1:9"
    assert "evaluate report" in promoted._repr_html_()
    assert "sandbox" in promoted.page._repr_html_()
    assert api.models() == []
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        api.run("eiffel", {"train.lr": 1})
