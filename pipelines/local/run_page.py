"""The page of a run, promoted or not: how it ended, the reports of its steps, and what to do next.

The page and the reports are copies in the run's folder with names that end in .html, so that any
browser shows them and they stay together when the folder is copied.
"""

import shutil
from pathlib import Path
from typing import Any

import click
import jinja2
from markupsafe import Markup

from nudge.components.common.core.figures import amounts, per_gain
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.sanitize import CSP, masked, visible
from nudge.pipelines.local.history import PastRun, curve
from nudge.pipelines.local.log_lines import step_lines
from nudge.pipelines.step_state import StepState
from nudge.pipelines.steps import described

REPORTS = {
    "evaluate": ("report.html", "Evaluation", "is the model better, and can that be trusted?"),
    "train": ("train.html", "Training", "loss, learning rate, speed and settings"),
    "ingest": ("ingest.html", "Text", "what was read, kept, held out and dropped"),
}
"""The reports that a run links: the file in its folder, the title, and the reader's question."""
GOOD, BAD = ("promoted",), ("failed", "unreadable", "interrupted")
HEADLINES = {
    "running": "This run is in progress",
    "promoted": "✓ The new model is served",
    "awaiting approval": "The new model is better and awaits approval",
    "approved": "The new model was approved",
    "rejected": "✗ The new model was rejected",
    "registered": "The new model is registered, not served",
    "not better": "✗ The new model was refused, so nothing changed",
    "nothing new": "There was no new text, so nothing changed",
    "failed": "✗ The run failed",
    "refused": "✗ The run was refused before it began",
    "interrupted": "✗ The run was interrupted",
    "unreadable": "✗ The run's result cannot be read",
}
LOG_LINES, LOG_BYTES, DRAWN_POINTS = 30, 200_000, 400
STYLE = Path(__file__).parents[2] / "components" / "evaluate" / "report.css"

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: visible(masked(value)) if type(value) is str else value,
)


def write_page(run: PastRun) -> Path:
    """Write the run's page and copy the reports that exist beside it; returns the page's path."""
    links = []
    for step, (file, title, about) in REPORTS.items():
        target = run.folder / file
        if source := run.output(step, "report"):
            part = run.folder / f".{file}.part"
            shutil.copyfile(source, part)
            part.replace(target)
        if target.is_file():
            links.append({"file": file, "title": title, "about": about})
    write_atomic(run.page, render(run, links))
    return run.page


def render(run: PastRun, links: list[dict[str, str]]) -> str:
    """The page as HTML."""
    metrics = run.result.get("metrics") or {}
    tone = "good" if run.state in GOOD else "bad" if run.state in BAD else ""
    recipe = run.recipe_file
    return ENVIRONMENT.get_template("run_page.html.j2").render(
        csp=CSP,
        css=Markup(STYLE.read_text(encoding="utf-8")),
        run=run,
        tone=tone,
        headline=HEADLINES.get(run.state, run.state),
        reference="the version served then" if "incumbent" in metrics else "the base model",
        duration=duration(run.seconds or 0),
        spent=amounts(run.spent, run.currency),
        per_gain=per_gain(run.cost),
        links=links,
        steps=[
            {
                "name": step.name,
                "status": status_of(run, step),
                "seconds": f"{step.seconds:.1f}" if step.seconds else "",
                "usage": amounts(run.spent_on(step.name), run.currency),
                "result": step.error or described(step.name, step.results),
            }
            for step in run.steps.values()
        ],
        drawn=_drawn(run),
        next=next_commands(run),
        files={name: path for name, path in _files(run).items() if path},
        recipe=recipe.read_text("utf-8", "replace") if recipe.is_file() else "",
        log=_log_end(run.log),
    )


def next_commands(run: PastRun) -> dict[str, str]:
    """The commands that make sense after a run, by what they do."""
    model = f" --model {run.model}" if run.model else ""
    found: dict[str, str] = {}
    if run.state == "promoted":
        found["ask it"] = f"nudge ask{model} 'a question'"
        if "incumbent" in (run.result.get("metrics") or {}):
            found["go back"] = f"nudge rollback{model}"
    elif run.state == "awaiting approval":
        found["serve it"] = f"nudge approve {run.version}{model}"
        found["refuse it"] = f"nudge reject {run.version}{model} --reason WHY"
    elif run.state == "approved":
        found["serve it"] = f"nudge approve {run.version}{model}"
    elif run.version and run.state != "rejected":  # which is archived
        found["serve it anyway"] = f"nudge promote {run.version}{model}"
    if run.state != "promoted" and run.output("train", "model"):
        found["talk to it"] = f"nudge chat {run.run_id}"
    if run.state in BAD:
        found["read the log"] = f"nudge logs {run.run_id}"
        found["try again"] = f"nudge run {run.recipe_file}"
    found["compare it"] = f"nudge runs compare {run.run_id} OTHER"
    return found


def duration(seconds: float) -> str:
    """``12 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def status_of(run: PastRun, step: StepState) -> str:
    """The status of a step; nothing runs or waits once the run has ended."""
    if run.state == "running" or step.status not in ("running", "waiting"):
        return step.status
    return "stopped" if step.status == "running" else "not begun"


def _files(run: PastRun) -> dict[str, Any]:
    return {
        "model folder": run.output("train", "model"),
        "model in the store": run.result.get("model_uri"),
        "endpoint": run.result.get("endpoint"),
        "recipe": run.recipe_file if run.recipe_file.is_file() else None,
        "log": run.log if run.log.is_file() else None,
        "folder": run.folder,
    }


def _log_end(log: Path) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    # The engine's lines if the steps wrote none.
    shown = list(step_lines(map(click.unstyle, lines), None, False)) or lines
    return "\n".join(shown[-LOG_LINES:])


def _drawn(run: PastRun) -> dict[str, Any] | None:
    points = curve(run)
    if len(points) < 2:
        return None
    thinned = points[:: max(1, len(points) // DRAWN_POINTS)]
    low, high = min(y for _, y in thinned), max(y for _, y in thinned)
    width, height = (thinned[-1][0] - thinned[0][0]) or 1, (high - low) or 1.0
    coordinates = [
        f"{1000 * (x - thinned[0][0]) / width:.1f},{97 - 94 * (y - low) / height:.1f}"
        for x, y in thinned
    ]
    return {
        "path": "M" + " L".join(coordinates),
        "first": f"{points[0][1]:.3f}",
        "last": f"{points[-1][1]:.3f}",
        "steps": points[-1][0],
    }
