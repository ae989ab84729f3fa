"""Hostile documents go through a step, and its page is opened in a real browser: nothing runs.

The pages of evaluate and of the summary have their tests beside those steps.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from nudge.components.train.settings import TrainSettings, WatchedPrompt
from nudge.components.train.train import train
from tests.components.train.conftest import SMALL, write_tokens
from tests.pages import browser, look

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "</td></style></svg><script>window.ran=1</script><img src=x onerror='window.ran=1'>{{7*7}}"
)
COVERED = {
    "ingest": "tests/security/test_pages.py",
    "train": "tests/security/test_pages.py",
    "train_on_nodes": "tests/security/test_pages.py",
    "evaluate": "tests/components/evaluate/test_report.py",
    "summary": "tests/components/summary/test_summary.py",
}
"""Each step that leaves a page, and where hostile text meets it."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def check(chromium: Any, path: Path) -> str:
    """Open a page on a telephone and on a desk; returns its text."""
    for width, scheme in ((390, "dark"), (1200, "light")):
        page, faults = look(chromium, path, width, scheme)
        assert faults == []
        assert page.evaluate("window.ran") is None
        assert page.locator("script, img, iframe").count() == 0
    return str(page.locator("body").inner_text())


def test_the_page_of_ingest(chromium: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    with (folder / "<img src=x onerror='window.ran=1'>.jsonl").open("w") as file:
        for number in range(30):
            text = f"{HOSTILE} number {number} of some length {number**5} {'word ' * number}"
            fields = {"id": HOSTILE + str(number), "licence": HOSTILE, "origin": HOSTILE}
            print(json.dumps({**fields, "text": text}), file=file)
        print(json.dumps({"text": HOSTILE[:10]}), file=file)
    settings = IngestSettings(
        data_uri=str(folder),
        validation_share=0.3,
        near_duplicates=False,
        license_column="licence",
        source_column="origin",
        workers=1,
    )
    ingest(settings, corpus=tmp_path / "corpus", report=tmp_path / "report.html")
    shown = check(chromium, tmp_path / "report.html")
    assert "<script>window.ran=1</script>" in shown
    assert "<img src=x onerror='window.ran=1'>.jsonl" in shown
    assert "{{7*7}}" in shown


def test_the_page_of_train(chromium: Any, tmp_path: Path, tiny_model: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", tiny_model)
    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps({**manifest, "corpus_fingerprint": HOSTILE}))
    watch = WatchedPrompt(prompt=HOSTILE, target=HOSTILE)
    settings = TrainSettings(base_model=str(tiny_model), **{**SMALL, "max_steps": 3}, watch=watch)
    made = {name: tmp_path / name for name in ("model", "history", "report.html")}
    model, history, report = made.values()
    train(settings, tokens=tokens, model=model, history=history, report=report)
    shown = check(chromium, report)
    assert "<script>window.ran=1</script>" in shown
    assert "{{7*7}}" in shown


def test_every_page_that_a_step_leaves_is_met_by_hostile_text() -> None:
    pages = set()
    for path in sorted((ROOT / "components").glob("*/component.py")):
        for name, signature in re.findall(
            r"^def (\w+)\((.*?)^\)", path.read_text(), re.DOTALL | re.MULTILINE
        ):
            if re.search(r"Output\[dsl\.(HTML|Markdown|SlicedClassificationMetrics)\]", signature):
                pages.add(name)
    assert pages == set(COVERED)
    for test in COVERED.values():
        assert re.search("hostile", (ROOT / test).read_text(), re.IGNORECASE), test
