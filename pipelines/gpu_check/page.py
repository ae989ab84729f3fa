"""The page of `nudge gpu-check`: what failed and why, the loss's speed, and every check."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nudge.components.common.core.sanitize import CSP, masked, visible

STYLE = Path(__file__).parents[2] / "components" / "evaluate" / "report.css"
GROUPS = {
    "kernel": "The fused loss and its kernel", "train": "Training, export, evaluation",
    "speed": "Speed",
}  # fmt: skip
MARKS = {"passed": "✓", "failed": "✗", "skipped": "–"}

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: visible(masked(value)) if type(value) is str else value,
)


def render(report: dict[str, Any]) -> str:
    """The page as HTML, from the values of the JSON file."""
    checks = report["checks"]
    groups = [
        {"title": title, "checks": [each for each in checks if _group(each) == name]}
        for name, title in GROUPS.items()
    ]
    tables = [each["figures"] for each in checks if each["figures"].get("rows")]
    machine = report["machine"]
    return ENVIRONMENT.get_template("page.html.j2").render(
        csp=CSP,
        css=Markup(STYLE.read_text(encoding="utf-8")),
        report=report,
        device=machine.get("GPU") if report["device"] == "gpu" else machine.get("processor"),
        headline=headline(report),
        failures=[each for each in checks if each["state"] == "failed"],
        groups=[each for each in groups if each["checks"]],
        marks=MARKS,
        rows=[_row(row) for table in tables for row in table["rows"]],
        masked=[_shares(each) for table in tables for each in table["masked"]],
        left_out=[each for table in tables for each in table["left_out"]],
        figures=_figures,
    )


def headline(report: dict[str, Any]) -> str:
    """The page's answer in one sentence."""
    failed, passed = report["failed"], report["passed"]
    if failed:
        return f"{failed} of {failed + passed} checks failed"
    return f"All {passed} checks passed" if passed else "No check could run here"


def _group(check: dict[str, Any]) -> str:
    return str(check["name"]).partition("-")[0]


def _figures(check: dict[str, Any]) -> str:
    """The figures of a check that passed, or the reason why it did not."""
    if check["message"]:
        return str(check["message"])
    shown = {k: v for k, v in check["figures"].items() if isinstance(v, str | int | float)}
    return ", ".join(
        f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shown.items()
    )


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table as text."""
    ours = row["ours"]
    return {
        "name": row["name"],
        "shape": row["shape"],
        "ours": _seconds(ours),
        "eager": _seconds(row["eager"]),
        "products": _seconds(row["products"]),
        "of_eager": f"{ours / row['eager']:.2f}",
        "of_products": f"{100 * row['products'] / ours:.0f} %",
        "memory": _mebibytes(row["ours_memory"]),
        "eager_memory": _mebibytes(row["eager_memory"]),
    }


def _shares(masked: dict[str, Any]) -> dict[str, Any]:
    first = masked["shares"][0]["seconds"]
    return {
        "name": masked["name"],
        "shares": [
            {
                "percent": each["percent"],
                "seconds": _seconds(each["seconds"]),
                "share": f"{each['seconds'] / first:.2f}",
            }
            for each in masked["shares"]
        ],
    }


def _seconds(value: float) -> str:
    return f"{1e3 * value:,.1f} ms"


def _mebibytes(value: float | None) -> str:
    return "not measured" if value is None else f"{value / 2**20:,.0f} MiB"
