"""The evaluation's page in a real browser: no overflow, no outside request, no hostile script."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.evaluation import Evaluation
from nudge.components.common.artifacts.schema import parse_artifact
from nudge.components.evaluate.report import render_report
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from tests.pages import browser, look

SAMPLE = json.loads((Path(__file__).parent / "sample_evaluation.json").read_text())
HOSTILE = "</td></style><script>window.ran=1</script><img src=x onerror='window.ran=1'>{{7*7}}‮"
VIEWS = [(390, "light"), (390, "dark"), (1200, "light")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def page_of(values: dict[str, Any]) -> str:
    return render_report(parse_artifact(values, Evaluation, "sample"))


def hostile(value: Any) -> Any:
    """The same evaluation, with an attack appended to every text that comes from data."""
    if isinstance(value, dict):
        kept = ("format", "state", "expect", "created", "kind")
        return {k: v if k in kept else hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_the_page_is_clean(chromium: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_of(SAMPLE), encoding="utf-8")
    page, faults = look(chromium, path, width, scheme)
    assert faults == []
    assert page.locator("h1").inner_text()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    level = sum(map(int, background[4:-1].split(",")[:3])) / 3
    assert (level < 80) == (scheme == "dark")


def test_another_training_step_can_be_selected(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_of(SAMPLE), encoding="utf-8")
    page, _ = look(chromium, path, 1200, "light")
    heading = page.locator("h3:visible", has_text="likeliest next tokens")
    before = heading.inner_text()
    page.get_by_text("step 0", exact=True).first.click()
    assert heading.inner_text() != before


def test_the_page_names_failed_checks_and_missing_ones() -> None:
    text = " ".join(page_of(SAMPLE).split())
    assert "Guard sets of other text: +0.0161 bits per byte on code" in text
    assert "Smoke completions: 2 of 2 are normal." in text
    assert "this was not tested" not in text
    bare = copy.deepcopy(SAMPLE)
    bare["verdict"]["checks"] = [c for c in bare["verdict"]["checks"] if c["kind"] != "guard"]
    del bare["guards"], bare["tasks"], bare["models"]
    text = " ".join(page_of(bare).split())
    assert "Guard sets of other text: none configured, so this was not tested." in text
    assert "other seeds and other kinds of text were not tried" in text


def test_the_page_says_what_quantizing_saved_and_cost() -> None:
    values = copy.deepcopy(SAMPLE)
    values["training"]["served"] = {
        "kind": "int8", "bytes_before": 2000, "bytes_after": 1250,
        "bits_per_byte_before": 1.5, "bits_per_byte_after": 1.5125,
    }  # fmt: skip
    text = " ".join(page_of(values).split())
    assert (
        "scored as it is served, with int8 weights: 750 of 2,000 bytes saved, for +0.0125 bits per "
        "byte of the training’s validation rows (1.5000 before, 1.5125 after)"
    ) in text
    assert "scored as it is served" not in page_of(SAMPLE)


@pytest.mark.parametrize("width", [390, 1200])
def test_hostile_text_is_shown_but_not_run(chromium: Any, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_of(hostile(SAMPLE)), encoding="utf-8")
    page, faults = look(chromium, path, width, "light")
    assert faults == []
    assert page.evaluate("window.ran") is None
    assert page.locator("script, img").count() == 0
    assert "{{7*7}}" in page.locator("body").inner_text()


def test_the_corpus_page_is_clean(chromium: Any, tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    lines = [{"text": f"{HOSTILE} number {n} of some length {n * n}"} for n in range(30)]
    (folder / "<b>.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "report.html"
    ingest(IngestSettings(data_uri=str(folder)), corpus=tmp_path / "corpus", report=path)
    for width, scheme in VIEWS:
        page, faults = look(chromium, path, width, scheme)
        assert faults == []
        assert page.evaluate("window.ran") is None
