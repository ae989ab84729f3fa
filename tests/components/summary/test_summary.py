"""The run's page: text from data stays text, however a Markdown viewer treats HTML."""

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from nudge.components.common.core.errors import UserError
from nudge.components.summary import summary as module
from tests.pages import browser, look

HOSTILE = [
    "<script>window.ran=1</script>",
    "<img src=x onerror='window.ran=1'>",
    "![x](http://127.0.0.1:1/pixel.png)",
    "[click](javascript:window.ran=1)",
    "`</code><svg onload='window.ran=1'>`",
    "| a | b |\n|---|---|\n# A heading\n\n<iframe src='http://127.0.0.1:1'></iframe>",
    "{{ 7 * 7 }} &lt;b&gt;",
]


def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    def silent(*_: Any, **__: Any) -> None:
        raise UserError(text)

    monkeypatch.setattr(module, "_local_events", lambda: (text, text, text))
    monkeypatch.setattr("nudge.components.common.clients.registry.connection.with_registry", silent)
    path = tmp_path / "page.md"
    module.summary(
        text,
        "http://registry",
        version=text,
        run_id="run",
        state="FAILED",
        task=text,
        error=text,
        page=path,
    )
    return path.read_text(encoding="utf-8")


def test_hostile_text_stays_text_in_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    markdown = page(tmp_path, monkeypatch, "\n".join(HOSTILE))
    # The most permissive viewer: raw HTML passes through.
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{shown}", encoding="utf-8")
    with browser() as opened:
        seen, faults = look(opened, path, 4000, "light")
        assert [fault for fault in faults if "wider" not in fault] == []
        assert seen.evaluate("window.ran") is None
        for tag in ("script", "img", "iframe", "svg", "a", "table"):
            assert seen.evaluate(f"document.querySelectorAll('{tag}').length") == 0, tag
        assert "<script>window.ran=1</script>" in seen.inner_text("body")
        assert "{{ 7 * 7 }}" in seen.inner_text("body")


def test_the_attack_of_this_test_works_without_escaping(tmp_path: Path) -> None:
    shown = MarkdownIt("commonmark", {"html": True}).render("\n\n".join(HOSTILE))
    assert "<script>" in shown
    assert "<img" in shown


def test_a_version_that_got_no_traffic_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "v2 was compared with v1, but v3 has the traffic now"
    found = {
        "uri": "s3://b/v2",
        "description": "better",
        "endpoint": "",
        "not_promoted": why,
        "awaiting": False,
    }
    monkeypatch.setattr(module, "_local_events", lambda: ("", "", ""))
    monkeypatch.setattr(
        "nudge.components.common.clients.registry.connection.with_registry", lambda *_, **__: found
    )
    path = tmp_path / "page.md"
    result = module.summary(
        "m", "http://r", version="v2", run_id="v2", state="SUCCEEDED", task="", error="", page=path
    )
    assert (result["registered"], result["promoted"]) == (True, False)
    page = path.read_text(encoding="utf-8")
    assert "**m v2** is registered, not promoted." in page
    assert f"| why not promoted | {why} |" in page


def test_plain_words_are_unchanged() -> None:
    text = "better by 0.1234 bits per byte (95% interval 0.1 to 0.2), model_name s3://b/k-1.0"
    assert module.plain(text) == text
