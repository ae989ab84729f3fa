"""A headless browser for the pages that steps write."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def browser() -> Iterator[Any]:
    """An installed Chromium or playwright's; skips with the reason if there is none."""
    from playwright.sync_api import Error, sync_playwright

    found = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium here to look at the page with: {error.message[:80]}")
        yield opened
        opened.close()


def look(opened: Any, page: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """Opens a page; returns it and everything that a reader should never see."""
    shown = opened.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults: list[str] = []
    shown.on("console", lambda message: faults.append(f"console: {message.text}"))
    shown.on("pageerror", lambda error: faults.append(f"error: {error}"))

    def dismiss(dialog: Any) -> None:
        faults.append("dialog")
        dialog.dismiss()

    shown.on("dialog", dismiss)
    shown.on("request", lambda asked: faults.append(f"asks for {asked.url}"))
    shown.goto(page.as_uri())
    faults.remove(f"asks for {page.as_uri()}")
    wide = shown.evaluate(
        """() => [...document.querySelectorAll("body *")]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && e.checkVisibility())
        .filter(e => { for (let p = e.parentElement; p; p = p.parentElement)
            if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return false;
            return true; })
        .map(e => e.outerHTML.slice(0, 120))"""
    )
    faults += [f"wider than {width}: {element}" for element in wide]
    if shown.evaluate("document.documentElement.scrollWidth") > width:
        faults.append(f"the page scrolls sideways at {width}")
    return shown, faults
