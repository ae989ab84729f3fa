"""The page that `evaluate` writes: is the candidate better, and can that be trusted?

Static HTML, CSS and SVG, because the dashboard shows it in a sandboxed frame. Positions in a plot
are percentages of its box, so that lines scale with the page while text keeps its size.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nudge.components.common.artifacts.evaluation import (
    Check,
    CorpusCounts,
    Evaluation,
    History,
    LearnedSample,
    ProbeResult,
    Verdict,
)
from nudge.components.common.core.figures import MISSING, finite, fixed, money, probability, signed
from nudge.components.common.core.sanitize import CSP, visible

CHOSEN_STEPS = 7
"""Training steps whose likeliest tokens the page can show."""
DRAWN_POINTS = 300
"""Points per plotted line; a longer line is thinned, and the page says so."""


@dataclass(frozen=True)
class Axis:
    """A linear scale from 0 to 100 with round ticks that show ``digits`` decimals."""

    low: float
    high: float
    ticks: list[float]
    digits: int

    def at(self, value: float) -> float:
        """The position of ``value``, in percent from the low end."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def axis(values: Sequence[float], *, ticks: int = 5, snug: bool = False) -> Axis:
    """An axis over ``values`` with about ``ticks`` ticks 1, 2 or 5 times a power of ten apart.

    It ends at round values, or at the extreme values if ``snug``.
    """
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next((m for m in (1, 2, 5) if m * power >= rough * (1 - 1e-9)), 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if snug:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        low, high = first * step, last * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(low, high, [n * step for n in range(first, last + 1)], digits)


def surprise(p: Any) -> float | None:
    """The loss -ln p in nats; None if p is not a positive number."""
    return -math.log(p) + 0.0 if finite(p) and p > 0 else None


def token_text(value: Any) -> str:
    """A token with visible spaces (·), newlines (↵) and tabs (⇥)."""
    marks = {" ": "·", "\n": "↵", "\t": "⇥", "\N{NO-BREAK SPACE}": "⍽"}
    return visible("".join(marks.get(char, char) for char in str(value))) or "(empty)"


def short(value: Any) -> Markup:
    """The first 12 characters of a hash, with the complete hash as its title."""
    text = visible(value) if isinstance(value, str) and value else MISSING
    cut = text if len(text) <= 16 else text[:12] + "…"
    return Markup('<code title="{}">{}</code>').format(text, cut)


def thin(points: Sequence[Any], most: int = DRAWN_POINTS) -> list[Any]:
    """At most ``most`` of the points, evenly chosen, including the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def choose(points: Sequence[Any], most: int = CHOSEN_STEPS) -> list[Any]:
    """The points to show: closer together where P moves, including the first and the last."""
    if len(points) <= most:
        return list(points)
    walked = [0.0]
    for old, new in itertools.pairwise(points):
        walked.append(walked[-1] + abs(new["p"] - old["p"]) + 0.5 / len(points))
    wanted = [walked[-1] * i / (most - 1) for i in range(most)]
    chosen = {min(range(len(walked)), key=lambda i: abs(walked[i] - w)) for w in wanted}
    return [points[i] for i in sorted(chosen)]


def _path(points: Sequence[Mapping[str, Any]], key: str, x: Axis, y: Axis) -> str:
    path = [f"{x.at(p['step']):g} {100 - y.at(p[key]):g}" for p in points]
    return "M" + "L".join(path)


def _dots(points: Sequence[Mapping[str, Any]], key: str, x: Axis, y: Axis) -> str:
    """Lines of zero length, which round caps turn into dots."""
    return "".join(f"M{x.at(p['step']):g} {100 - y.at(p[key]):g}h0" for p in points)


def _points(rows: Any, key: str) -> list[dict[str, Any]]:
    return [row for row in rows or [] if finite(row.get("step")) and finite(row.get(key))]


def _interval(verdict: Verdict) -> dict[str, Any] | None:
    ends, difference = verdict.interval or (), verdict.difference_bits_per_byte
    if not ends or difference is None or not all(map(finite, [*ends, difference])):
        return None
    x = axis([*ends, difference, 0.0, -verdict.margin], ticks=4)
    room = (x.high - x.low) * 0.04  # keeps zero off the edge
    return {"x": Axis(x.low - room, x.high + room, x.ticks, x.digits), "ends": ends}


def _losses(history: History) -> dict[str, Any] | None:
    steps = _points(history.steps, "loss")
    validation = _points([asdict(each) for each in history.validation], "loss")
    if not steps and not validation:
        return None
    x = axis([0, *(p["step"] for p in steps + validation)], snug=True)
    y = axis([p["loss"] for p in steps + validation])
    drawn = thin(steps)
    return {
        "x": x,
        "y": y,
        "train": _dots(drawn, "loss", x, y) if drawn else "",
        "train_line": _path(drawn, "loss", x, y) if drawn else "",
        "validation": _path(validation, "loss", x, y) if validation else "",
        "validation_dots": _dots(thin(validation), "loss", x, y),
        "thinned": [len(drawn), len(steps)] if len(drawn) < len(steps) else None,
        "ends": [validation[0], validation[-1]] if len(validation) > 1 else None,
    }


def _example(probes: Sequence[ProbeResult], history: History) -> dict[str, Any] | None:
    """The running example: the first probe, shown at training steps if training watched it."""
    watched = asdict(history.probe) if history.probe else {}
    points = _points(watched.get("points"), "p")
    first = asdict(probes[0]) if probes else {}
    same = all(first.get(key) == watched.get(key) for key in ("prompt", "target"))
    if points and (same or not probes):
        panels = [{"label": f"step {p['step']:,}", **p} for p in choose(points)]
    elif probes:
        points = []
        panels = [
            {"label": when, "p": first.get(f"p_{when}"), "top": first.get(f"rivals_{when}")}
            for when in ("before", "after")
        ]
    else:
        return None
    example: dict[str, Any] = {**watched, **first, "panels": panels, "curve": None}
    if points:
        x = axis([0, *(p["step"] for p in points)], snug=True)
        y = axis([0.0, 1.0])
        drawn = thin(points)
        path, dots = _path(drawn, "p", x, y), _dots(drawn, "p", x, y)
        example["curve"] = {"x": x, "y": y, "path": path, "dots": dots, "points": points}
    return example


def _groups(probes: Sequence[ProbeResult]) -> list[dict[str, Any]]:
    groups = []
    for expect in ("rise", "hold"):
        members = [probe for probe in probes if probe.expect == expect]
        values = [p for probe in members for p in (probe.p_before, probe.p_after)]
        if expect == "hold":
            limits = [(probe.p_before, probe.limit) for probe in members]
            values += [p * (1 + limit) for p, limit in limits if p is not None and limit]
        heights = [p for p in values if p is not None and math.isfinite(p)]
        top = min(1.0, axis([0.0, *heights]).high) if max(heights, default=0) > 0 else 1.0
        good = sum(probe.ok for probe in members)
        groups.append({"expect": expect, "probes": members, "top": top, "good": good})
    return groups


CHECKS = {
    "loss": ("Losses", "every loss is finite."),
    "probe": ("Probes that should hold", "{} of {} did."),
    "guard": ("Guard sets of other text", "{} of {} stayed within their limits."),
    "completion": ("Smoke completions", "{} of {} are normal."),
    "answer": ("Expected answers", "{} of {} are as expected."),
    "turn": ("End of turn", "enough answers end with the end-of-turn token."),
    "judge": ("Pairwise judge", "the candidate is preferred often enough."),
    "task": ("Tasks with a limit", "{} of {} stayed within their limits."),
    "package": ("Checks of installed packages", "{} of {} passed."),
}
"""The title of each kind of check, and the sentence for a kind whose checks all pass."""
OPTIONAL = ("package", "answer", "turn", "judge")
"""Kinds that a report mentions only if there are such checks."""


def _checks(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks by kind: title, count, and the failed ones."""
    kinds = []
    for kind, (name, fine) in CHECKS.items():
        members = [check for check in checks if check.kind == kind]
        if kind in OPTIONAL and not members:  # nothing asked for these
            continue
        failed = [check for check in members if not check.ok]
        sentence = fine.format(len(members) - len(failed), len(members))
        kinds.append({"name": name, "count": len(members), "failed": failed, "fine": sentence})
    return kinds


def _reconcile(corpus: CorpusCounts | None) -> dict[str, int] | None:
    """Unexplained differences between read, dropped, kept and split; None if not all are known."""
    if corpus is None:
        return None
    dropped = sum(corpus.dropped.values())
    parts = [corpus.train, corpus.validation]
    counts: list[Any] = [corpus.documents_in, corpus.documents, corpus.bytes]
    split: list[Any] = [getattr(part, key) for key in ("documents", "bytes") for part in parts]
    if not all(map(finite, counts + split)):
        return None
    read, kept, size = counts
    return {
        "kept": read - dropped - kept,
        "split": kept - split[0] - split[1],
        "bytes": size - split[2] - split[3],
    }


def _colored(samples: Sequence[LearnedSample]) -> list[list[tuple[str, bool]]]:
    """Each sample as runs of text, with whether the model learns them."""
    colored = []
    for sample in samples:
        at, runs = 0, list[tuple[str, bool]]()
        for first, last in sample.learned:
            runs += [(sample.text[at:first], False), (sample.text[first:last], True)]
            at = last
        runs.append((sample.text[at:], False))
        colored.append([run for run in runs if run[0]])
    return colored


def hours(value: float | None) -> str:
    """Hours or kilowatt-hours to three significant digits, without an exponent."""
    if value is None or not math.isfinite(value):
        return MISSING
    digits = 2 if not value else min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{digits}f}"


def _finalize(value: Any) -> Any:
    if value is None or isinstance(value, jinja2.Undefined):
        return MISSING
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=_finalize,
    undefined=jinja2.ChainableUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters.update(
    fixed=fixed,
    signed=signed,
    p=probability,
    surprise=surprise,
    token=token_text,
    short=short,
    hours=hours,
    money=money,
)
PAGES.tests["finite"] = finite
PAGES.globals["csp"] = CSP


def render_report(evaluation: Evaluation) -> str:
    """One self-contained page of an evaluation; all text from it is escaped.

    Parts that the evaluation lacks are left out of the page or called not available.
    """
    probes, verdict = evaluation.probes or (), evaluation.verdict or Verdict()
    settings = evaluation.lineage.settings if evaluation.lineage else {}
    values = {field.name: getattr(evaluation, field.name) for field in fields(evaluation)}
    return PAGES.get_template("report.html.j2").render(
        {**values, "verdict": verdict, "format": Evaluation.FORMAT, "version": Evaluation.VERSION},
        interval=_interval(verdict),
        example=_example(probes, evaluation.history),
        groups=_groups(probes),
        checks=_checks(verdict.checks),
        losses=_losses(evaluation.history),
        unexplained=_reconcile(evaluation.corpus),
        colored=_colored(evaluation.learned or ()),
        unit=(evaluation.method.unit if evaluation.method else None) or "held-out text",
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
    )
