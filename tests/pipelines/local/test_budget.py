"""A run that its budget will not cover is refused before it starts, by what earlier runs used."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nudge.components.common.core.errors import UserError
from nudge.components.common.spending.budget import OverBudget
from nudge.components.summary import notify as notifying
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import budget
from nudge.pipelines.recipes import load
from tests.pipelines.finished_run import finished_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_earlier_run_says_what_the_next_one_needs(home: Path) -> None:
    budget.check(load("eiffel", ["budget.core_hours=0.001"]), home)  # nothing is known yet
    run = finished_run(home, core_hours=3.0)
    budget.check(load("eiffel"), home)  # no limit
    budget.check(load("eiffel", ["budget.core_hours=3.5"]), home)
    with pytest.raises(OverBudget, match="^over budget: the run needs about 3 core h") as error:
        budget.check(load("eiffel", ["budget.core_hours=2.5"]), home)
    assert run.run_id in str(error.value)
    assert "--set budget.KEY=VALUE" in str(error.value)
    priced = ["prices.core_hour=2", "budget.cost=5", "prices.currency=EUR"]
    with pytest.raises(UserError, match=r"EUR 6\.00, and budget.cost is 5"):
        budget.check(load("eiffel", priced), home)


def test_training_counts_in_proportion_to_its_epochs(home: Path) -> None:
    finished_run(home, core_hours=3.0, settings=("train.epochs=2",))
    half = ["train.epochs=1", "budget.core_hours=2"]
    budget.check(load("eiffel", half), home)
    with pytest.raises(UserError, match="about 6 core hours"):
        budget.check(load("eiffel", ["train.epochs=4", "budget.core_hours=5"]), home)


def test_a_failed_run_does_not_count_as_a_measurement(home: Path) -> None:
    finished_run(home, core_hours=9.0, failed="train")
    budget.check(load("eiffel", ["budget.core_hours=0.001"]), home)


def test_a_budget_of_money_needs_a_price() -> None:
    with pytest.raises(UserError, match="budget.cost needs a price, such as prices.gpu_hour"):
        load("eiffel", ["budget.cost=5"])


def test_the_command_starts_nothing_and_notifies_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_run(home, core_hours=3.0)
    sent: list[Any] = []
    monkeypatch.setitem(notifying.SENDERS, "webhook", lambda _, __, notice: sent.append(notice))
    monkeypatch.setenv("NUDGE_NOTIFY_WEBHOOK", "http://127.0.0.1:9/secret")
    monkeypatch.setattr("nudge.pipelines.cli.run._prepare", lambda *_: pytest.fail("it started"))
    options = ["budget.core_hours=1", "notify.channels=[webhook]"]
    arguments = [word for option in options for word in ("--set", option)]
    done = CliRunner().invoke(main, ["run", "eiffel", *arguments], catch_exceptions=False)
    assert done.exit_code == 2
    assert "error: over budget: the run needs about 3 core hours" in done.stderr
    assert len(list((home / "runs").glob("[0-9]*"))) == 1  # only the earlier one
    assert list((home / "services").glob("object-store*")) == []
    (notice,) = sent
    assert notice.event == "over budget"
    assert "was not started" in notice.title


def test_what_a_run_used_is_in_its_result_on_its_page_and_in_comparisons(home: Path) -> None:
    prices = ("prices.core_hour=2", "prices.currency=EUR")
    run = finished_run(home, core_hours=3.0, settings=prices)
    other = finished_run(home, 1.4, promoted=False)
    result = json.loads((run.folder / "result.json").read_text())
    assert result["usage"]["steps"]["train"]["core_hours"] == 3.0
    assert result["usage"]["total"]["cost"] == 6.0
    assert result["usage"]["currency"] == "EUR"
    page = (run.folder / "index.html").read_text()
    HTMLParser().feed(page)
    assert page.count("EUR 6.00, 3 core hours") == 2  # in all, and of its only step that used any
    arguments = ["runs", "compare", run.run_id, other.run_id, "--json"]
    compared = json.loads(CliRunner().invoke(main, arguments, catch_exceptions=False).stdout)
    assert compared["outcome"]["core_hours"] == [3.0, 0.0]
