"""The morning's page: what the scheduled runs of this machine did, newest first."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.sanitize import CSP
from nudge.components.common.local.state_file import read_lines
from nudge.pipelines.local.run_page import ENVIRONMENT, HEADLINES, STYLE, duration

PAGE, LINES = "nights.html", "nights.jsonl"
SHOWN = 60
NONE = "No night yet"
BAD = ("failed", "refused", "interrupted", "unreadable")


def note(home: Path, night: dict[str, Any]) -> Path:
    """Add a night to the list and write the page; returns the page's path.

    ``night`` has name, began (seconds since the epoch), state, reason, run_id, seconds,
    bits_per_byte and difference; what is unknown is None.
    """
    path = home / "schedules" / LINES
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(night).encode() + b"\n")
    return write_page(home)


def write_page(home: Path) -> Path:
    """Write the page from the list of nights; returns its path."""
    page = home / "schedules" / PAGE
    write_atomic(page, render(home))
    return page


def render(home: Path) -> str:
    """The page as HTML."""
    lines = [each for each in read_lines(home / "schedules" / LINES) if "state" in each]
    nights = [_shown(home, each) for each in reversed(lines)][:SHOWN]
    empty = {"state": NONE, "name": "no schedule", "began": "no night yet", "reason": ""}
    last = nights[0] if nights else empty
    states = [night["state"] for night in nights]
    counts = ", ".join(f"{states.count(each)} {each}" for each in dict.fromkeys(states))
    bits = [
        night["bits_per_byte"]
        for night in reversed(nights)
        if (night["name"], night["state"]) == (last["name"], "promoted")
        and isinstance(night["bits_per_byte"], float)
    ]
    return ENVIRONMENT.get_template("nights.html.j2").render(
        csp=CSP,
        css=Markup(STYLE.read_text(encoding="utf-8")),
        home=str(home),
        now=f"{datetime.now():%Y-%m-%d %H:%M}",
        headline=HEADLINES.get(last["state"], last["state"]),
        last=last,
        nights=nights,
        counts=counts,
        best=(bits[0], bits[-1]) if len(bits) > 1 else None,
        bad=BAD,
    )


def _shown(home: Path, night: dict[str, Any]) -> dict[str, Any]:
    run_id = str(night.get("run_id") or "")
    page = home / "runs" / run_id / "index.html"
    began, seconds = night.get("began"), night.get("seconds")
    there = bool(run_id) and "/" not in run_id and page.is_file()
    return {
        "name": str(night.get("name") or ""),
        "began": f"{datetime.fromtimestamp(began):%Y-%m-%d %H:%M}"
        if isinstance(began, int | float)
        else "",
        "state": str(night["state"]),
        "reason": str(night.get("reason") or ""),
        "bits_per_byte": night.get("bits_per_byte"),
        "difference": night.get("difference"),
        "took": duration(seconds) if isinstance(seconds, int | float) else "",
        "page": f"../runs/{run_id}/index.html" if there else "",
    }
