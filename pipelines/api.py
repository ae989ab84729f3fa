"""nudge for notebooks and scripts: run a recipe, list runs and models, with typed results.

.. code-block:: python

    from nudge.pipelines import api as nudge

    run = nudge.run("eiffel", {"train.epochs": 2})
    run.promoted, run.reason
    run                      # in a notebook: the run's evaluation, inline
    nudge.runs()[0]
    nudge.models()

The functions do what the commands of the same names do, in the same folder (`NUDGE_HOME`, or
``.nudge`` in the current directory). The import is ``nudge.pipelines.api`` and not ``nudge`` itself
because ``nudge`` is a namespace (PEP 420): the kernels are a distribution of their own and install
into it, and a ``nudge/__init__.py`` in one of the two would hide the other in an editable install.
"""

import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.errors import UserError
from nudge.pipelines import recipes
from nudge.pipelines.cli import models as model_commands
from nudge.pipelines.cli import run as run_commands
from nudge.pipelines.local import history, run_page
from nudge.pipelines.local.result import keep_result
from nudge.pipelines.local.services import NothingRun

FRAME = "width: 100%; height: 40em; border: 0"


@dataclass(frozen=True)
class Page:
    """An HTML page on disk; a notebook shows it inline, in a sandboxed frame."""

    path: Path

    def _repr_html_(self) -> str:
        text = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<div><iframe srcdoc="{text}" sandbox style="{FRAME}"></iframe></div>'


@dataclass(frozen=True)
class Run:
    """A run of this machine that has ended or is active."""

    run_id: str
    recipe: str
    state: str
    """running, promoted, awaiting approval, approved, rejected, registered, not better, nothing
    new, failed, interrupted, unreadable."""
    reason: str
    """The verdict in words, or what failed."""
    model: str
    """The registered model's name."""
    version: str
    """Empty if the run registered none."""
    bits_per_byte: float | None
    """The candidate's, on held-out text."""
    difference: float | None
    """Candidate minus the version served then, or the base model; negative is better."""
    model_folder: Path | None
    endpoint: str
    """Empty unless the run's model is served."""
    report: Page | None
    """The evaluation: is the model better, and can that be trusted?"""
    page: Page
    """The run's page, which links the report of each step."""
    result: dict[str, Any]
    """The object that `nudge run --json` prints; empty if the run did not end."""

    @property
    def promoted(self) -> bool:
        """Whether the run's model was served when it ended."""
        return self.state == "promoted"

    def _repr_html_(self) -> str:
        return (self.report or self.page)._repr_html_()


@dataclass(frozen=True)
class Model:
    """A registered version."""

    model: str
    version: str
    made: str
    bits_per_byte: float | None
    difference: float | None
    """To the base model; negative is better."""
    share: int
    """Percent of the traffic."""
    endpoint: str
    """Empty unless the version has traffic."""
    archived: bool
    uri: str


def run(
    recipe: str = "eiffel",
    settings: Mapping[str, Any] | Iterable[str] = (),
    *,
    fresh: bool = False,
) -> Run:
    """Run the pipeline here with a recipe (a shipped one's name, or a YAML file) and wait for it.

    ``settings`` change the recipe: values by dotted key, or texts as after ``--set``. Raises
    `UserError` if the input is refused or if a step fails; the message says which, and where the
    log is.
    """
    if isinstance(settings, Mapping):
        settings = [f"{key}={_yaml(value)}" for key, value in settings.items()]
    loaded = recipes.load(recipe, settings)
    ended = run_commands.execute(loaded, nudge_home(), fresh=fresh)
    values = keep_result(ended)
    ended.lock.close()
    if values["error"]:
        raise UserError(f"{values['error']}\nthe full log: {ended.log}")
    return _run(history.ended(ended, values))


def runs() -> list[Run]:
    """The runs of this machine, newest first."""
    return [_run(each) for each in history.runs(nudge_home())]


def models(model: str = "") -> list[Model]:
    """The registered versions of a model, or of every model."""
    try:
        rows = model_commands.model_rows(model)
    except NothingRun:
        return []
    return [
        Model(
            model=row["model"],
            version=row["version"],
            made=row["made"],
            bits_per_byte=row["bits_per_byte"],
            difference=row["difference"],
            share=row["share"],
            endpoint=row["endpoint"] or "",
            archived=row["state"] == "ARCHIVED",
            uri=row["uri"],
        )
        for row in rows
    ]


def _run(past: history.PastRun) -> Run:
    report = past.folder / "report.html"
    page = past.page if past.page.is_file() else run_page.write_page(past)
    return Run(
        run_id=past.run_id,
        recipe=past.recipe,
        state=past.state,
        reason=past.reason,
        model=past.model,
        version=past.version,
        bits_per_byte=past.bits_per_byte,
        difference=past.difference,
        model_folder=past.output("train", "model"),
        endpoint=str(past.result.get("endpoint") or ""),
        report=Page(report) if report.is_file() else None,
        page=Page(page),
        result=past.result,
    )


def _yaml(value: Any) -> str:
    """A value as it is written after ``--set KEY=``."""
    return json.dumps(value, ensure_ascii=False)
