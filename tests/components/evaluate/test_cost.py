"""What a candidate took to make is in its evaluation, on its report, and in the registry."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.evaluation import (
    Evaluation,
    Metrics,
    Verdict,
    read_evaluation,
    write_evaluation,
)
from nudge.components.common.spending.prices import Prices
from nudge.components.common.spending.usage import Usage, plain_usage
from nudge.components.evaluate.account import add_cost

FOUND = Evaluation(
    verdict=Verdict(promote=True, reason="0.05 better", difference_bits_per_byte=-0.05),
    metrics={"base": Metrics(bits_per_byte=1.3), "candidate": Metrics(bits_per_byte=1.25)},
)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An evaluation, a model that took two GPU hours, and the events of the steps before."""
    write_evaluation(tmp_path / "evaluation", FOUND)
    (tmp_path / "model").mkdir()
    facts: dict[str, Any] = {
        "format": "nudge.model", "version": 1, "base_model": {"uri": "", "sha256": ""},
        "data_fingerprint": "d", "tokenizer_sha256": "e", "settings": {}, "seed": 1,
        "code_version": "1", "training": {"usage": plain_usage(Usage(gpu_seconds=7200.0))},
    }  # fmt: skip
    (tmp_path / "model" / "nudge.json").write_text(json.dumps(facts))
    events = tmp_path / "events"
    monkeypatch.setenv("NUDGE_EVENTS", str(events))
    ingest = {"usage": {"core_seconds": 1.0}, "made_with": {"core_seconds": 3600.0}}
    train = {"usage": {"core_seconds": 9.0}}  # its facts know more: the ranks, earlier attempts
    events.write_text(
        "".join(
            json.dumps({"time": 1, "step": step, "event": "step_end", **values}) + "\n"
            for step, values in (("ingest", ingest), ("train", train))
        )
    )
    return tmp_path


def test_the_cost_stands_beside_the_verdict(made: Path) -> None:
    prices = Prices(gpu_hour=4.0, core_hour=1.0, currency="EUR")
    figures = add_cost(made / "evaluation", made / "report", made / "model", prices)
    found = read_evaluation(made / "evaluation")
    assert found.cost is not None
    assert found.cost.steps["train"].gpu_hours == 2.0
    assert found.cost.steps["ingest"].core_hours == 1.0  # reused: what it used when it ran
    assert figures["cost"] == pytest.approx(2 * 4.0 + 1.0, abs=0.01)
    assert figures["cost_per_gained_bit_per_byte"] == pytest.approx(9.0 / 0.05, abs=0.2)
    page = (made / "report").read_text()
    assert "EUR 9.00" in page
    assert "EUR 180.00 per gained bit per byte" in page
    assert replace(found, cost=None) == replace(FOUND, cost=None)


def test_a_small_cost_is_written_without_an_exponent(made: Path) -> None:
    prices = Prices(gpu_hour=0.00001, core_hour=0.00002, currency="EUR")
    add_cost(made / "evaluation", made / "report", made / "model", prices)
    page = (made / "report").read_text()
    assert '<p class="big">EUR 0.00004</p>' in page
    assert "EUR 0.0008 per gained bit per byte" in page


def test_without_prices_the_report_counts_hours(made: Path) -> None:
    add_cost(made / "evaluation", made / "report", made / "model", Prices())
    page = (made / "report").read_text()
    assert "2.00 <small>GPU hours</small>" in page
    assert "40.0 GPU hours per gained bit per byte" in page
    assert "set <code>prices</code>" in page


def test_without_a_gain_nothing_is_divided(made: Path) -> None:
    worse = replace(FOUND, verdict=Verdict(reason="worse", difference_bits_per_byte=0.01))
    write_evaluation(made / "evaluation", worse)
    figures = add_cost(made / "evaluation", made / "report", made / "model", Prices(gpu_hour=1.0))
    assert "cost_per_gained_bit_per_byte" not in figures
    assert "nothing was gained" in (made / "report").read_text()


def test_an_evaluation_of_an_older_release_has_no_cost_and_its_page_does_not_mention_it() -> None:
    from nudge.components.evaluate.report import render_report

    assert 'id="cost"' not in render_report(FOUND)
