"""The result of a run: one JSON object, and the pages in the run's folder."""

import json
from pathlib import Path
from typing import Any

import click

from nudge.components.common.artifacts.cost import step_cost
from nudge.components.common.artifacts.evaluation import Evaluation, read_evaluation
from nudge.components.common.artifacts.schema import plain
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.nothing_new import nothing_new
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.core.sanitize import masked
from nudge.components.common.core.say import say
from nudge.components.common.spending.prices import Prices
from nudge.components.common.spending.usage import NOTHING, usage_of
from nudge.pipelines.local import history, run_page
from nudge.pipelines.local.run import Run
from nudge.pipelines.steps import PIPELINE, STEPS

PROBE_KEYS = ("prompt", "target", "p_before", "p_after", "expect", "ok")


def result(run: Run) -> dict[str, Any]:
    """The object that `nudge run --json` prints; a value that the run did not reach is None.

    recipe, run_id: names. seconds, overhead_seconds: wall time, and the part outside of steps.
    steps: [{name, seconds, status}], status one of done, reused, skipped, failed.
    metrics: {base, candidate, and incumbent where one is served} -> {nats_per_token,
    token_perplexity, bits_per_byte, word_perplexity, tokens, bytes, documents} of held-out text;
    empty if not evaluated.
    probes: [{prompt, target, p_before, p_after, expect, ok}].
    promoted: whether the candidate is served now; reason: the evaluation's verdict in words, and
    why a better candidate was not promoted. awaiting_approval: whether only a person's approval is
    missing (deploy.approval).
    model_path, report, page: local files; the page links every step's report. model_uri: in the
    object store; registered_model, version: in the registry; endpoint, served_model: for OpenAI's
    API. usage: what this run spent, by step and as a total: {core_hours, gpu_hours, kwh, cost}; a
    reused step cost nothing. cost: what the candidate took to make, reused steps included, and per
    gained bit per byte; None if not evaluated. error: None, or what failed.
    """
    evaluation = _evaluation(run)
    results = {name: step.results for name, step in run.steps.items()}
    report = run.steps["evaluate"].outputs.get("report")
    names = ("nats_per_token", "token_perplexity", "bits_per_byte", "word_perplexity")
    counts = ("tokens", "bytes", "documents")
    no_text = nothing_new(results["ingest"]) if results["ingest"].get("new") == 0 else ""
    promoted = run.steps["deploy"].status == "done" and results["deploy"].get("promoted", True)
    reason = no_text or (evaluation.verdict and evaluation.verdict.reason)
    if refused := results["deploy"].get("reason"):
        outcome = (
            refused if results["deploy"].get("awaiting_approval") else (f"not promoted: {refused}")
        )
        reason = f"registered, {outcome} (the evaluation: {reason})"
    return {
        "recipe": run.recipe.name,
        "run_id": run.run_id,
        "steps": [
            {"name": step.name, "seconds": round(step.seconds, 3), "status": step.status}
            for step in run.steps.values()
        ],
        "metrics": {
            which: {key: getattr(metrics, key) for key in (*names, *counts)}
            for which, metrics in evaluation.metrics.items()
        },
        "probes": [
            {key: getattr(probe, key) for key in PROBE_KEYS} for probe in evaluation.probes or ()
        ],
        "promoted": promoted,
        "awaiting_approval": bool(results["deploy"].get("awaiting_approval")),
        "reason": reason,
        "model_path": run.steps["train"].outputs.get("model"),
        "model_uri": results["upload"].get("uri"),
        "registered_model": results["register"].get("registered_model"),
        "version": results["register"].get("version"),
        "endpoint": results["deploy"].get("endpoint") if promoted else None,
        "served_model": results["deploy"].get("served_model"),
        "report": str(run.folder / "report.html") if report else None,
        "page": str(run.folder / "index.html"),
        "usage": usage(run),
        "cost": evaluation.cost and plain(evaluation.cost),
        "seconds": round(run.seconds, 3),
        "overhead_seconds": round(run.seconds - sum(s.seconds for s in run.steps.values()), 3),
        "error": _error(run, evaluation),
    }


def _error(run: Run, evaluation: Evaluation) -> str | None:
    """What failed: a step, the engine that skipped one, or the pipeline as a whole."""
    if run.failed:
        return run.failed.error
    if run.exit_status:
        ended = f"the pipeline ended with status {run.exit_status}"
        said = _last_line(run.log)
        return f"{ended}: {said}; see {run.log}" if said else f"{ended}; see {run.log}"
    due = {
        "always": True,
        "new text": bool(run.steps["ingest"].results.get("new")),
        "better": bool(evaluation.verdict and evaluation.verdict.promote),
    }
    # The engine treats a condition that it cannot evaluate as false, and a container that is gone
    # as one that ended well.
    skipped = [
        name for name in PIPELINE if due[STEPS[name].runs] and run.steps[name].status == "skipped"
    ]
    if skipped:
        return f"the engine skipped {', '.join(skipped)}, which should have run; see {run.log}"
    return None


def _last_line(log: Path) -> str:
    """The last line of a log that is not blank, without colors; empty if there is none."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    _, _, line = text.rstrip().rpartition("\n")
    return masked(click.unstyle(line).strip())


def usage(run: Run) -> dict[str, Any]:
    """What the run spent: ``steps`` and ``total``, and the ``currency`` of a cost."""
    try:
        prices = step_settings(Prices, "prices", run.recipe.text)
    except UserError:  # the recipe of a run that an older nudge began
        prices = Prices()
    spent = {name: usage_of(step.usage) for name, step in run.steps.items()}
    known = {name: each for name, each in spent.items() if each}
    total = sum(known.values(), NOTHING)
    return {
        "steps": {name: plain(step_cost(each, prices)) for name, each in known.items()},
        "total": plain(step_cost(total, prices)),
        "currency": prices.currency if prices.known else "",
    }


def keep_result(run: Run) -> dict[str, Any]:
    """Write result.json, report.html, summary.md and the run's page with the other steps' reports
    into the run's folder; returns the result."""
    for name, (step, output) in {
        "report.html": ("evaluate", "report"),
        "summary.md": ("summary", "page"),
    }.items():
        if path := run.steps[step].outputs.get(output):
            write_atomic(run.folder / name, Path(path).read_text(encoding="utf-8"))
    values = result(run)
    write_atomic(run.folder / "result.json", json.dumps(values, indent=2) + "\n")
    try:
        run_page.write_page(history.ended(run, values))
    except OSError as error:  # no space, for example: the run itself ended as its result says
        say(f"the run's page was not written: {error}")
    return values


def _evaluation(run: Run) -> Evaluation:
    path = run.steps["evaluate"].outputs.get("evaluation")
    return read_evaluation(Path(path)) if path else Evaluation()
