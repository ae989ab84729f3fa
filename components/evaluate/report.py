"""The evaluation's page, made for one question: is it better, and can I trust that?"""

import math
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from nudge.components.evaluate.charts import Series, line_chart

MOST_MOMENTS = 8
"""Training steps whose likeliest next tokens can be chosen on the page."""


def render_report(evaluation: dict[str, Any]) -> str:
    """One self-contained HTML page of an evaluation (nudge.evaluation version 1).

    Needs no script and makes no request, so that it shows inside a dashboard's sandbox. Everything
    that came from data is escaped; what a run did not record is left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, p=probability, si=thousands)
    history = evaluation["history"]
    probe = history.get("probe")
    return environment.get_template("report.html.j2").render(
        e=evaluation,
        example=_example(evaluation),
        moments=_moments(probe["points"]) if probe else [],
        curve=_probability_chart(probe) if probe else Markup(""),
        losses=_loss_chart(history),
        interval=_interval(evaluation["verdict"]),
        rise=[probe for probe in evaluation["probes"] if probe["expect"] == "rise"],
        hold=[probe for probe in evaluation["probes"] if probe["expect"] == "hold"],
        sums=_sums(evaluation["corpus"]),
    )


def visible(text: str) -> str:
    """A token or prompt with what cannot be seen made visible: a space as ␣, controls by name."""
    shown = []
    for character in text:
        if character == " ":
            shown.append("␣")
        elif character == "\n":
            shown.append("⏎")
        elif unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn", "Zl", "Zp"):
            shown.append(f"⟨U+{ord(character):04X}⟩")
        else:
            shown.append(character)
    return "".join(shown)


def probability(value: float) -> str:
    """A probability in percent, precise where it is small."""
    if value >= 0.1:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.2f} %" if value >= 0.0001 else "< 0.01 %"


def thousands(value: float) -> str:
    """A count with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def _example(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """The running example: the first probe, with the loss that its probabilities mean."""
    if not evaluation["probes"]:
        return None
    first: dict[str, Any] = evaluation["probes"][0]
    losses = {f"loss_{when}": -math.log(first[f"p_{when}"]) for when in ("before", "after")}
    return {**first, **losses}


def _moments(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    count = min(MOST_MOMENTS, len(points))
    if count < 2:
        return points
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _probability_chart(probe: dict[str, Any]) -> Markup:
    points = [(float(point["step"]), float(point["p"])) for point in probe["points"]]
    return line_chart(
        [Series("P", "after", points, dots=len(points) < 60)],
        title=f"P({visible(probe['target'])}) over the training steps",
        x_label="training step",
        y_label="probability",
        y_range=(0.0, 1.0),
    )


def _loss_chart(history: dict[str, Any]) -> Markup:
    training = [(float(line["step"]), float(line["loss"])) for line in history["steps"]]
    validation = [(float(line["step"]), float(line["loss"])) for line in history["validation"]]
    return line_chart(
        [
            Series("each step", "faint", training),
            Series("training, running mean", "before", _smooth(training)),
            Series("validation", "after", validation, dots=True),
        ],
        title="Loss over the training steps",
        x_label="training step",
        y_label="loss, nats per token",
    )


def _smooth(points: list[tuple[float, float]], share: float = 0.1) -> list[tuple[float, float]]:
    """A running mean that forgets ``1 - share`` a point; the first points are its start."""
    made: list[tuple[float, float]] = []
    mean = math.nan
    for x, y in points:
        mean = y if math.isnan(mean) else (1 - share) * mean + share * y
        made.append((x, mean))
    return made


def _interval(verdict: dict[str, Any]) -> dict[str, float] | None:
    """Places in percent of a strip that holds zero and the interval, with some air."""
    low, high = verdict["interval"]
    reach = 1.15 * max(abs(low), abs(high), verdict["margin"]) or 1.0

    def place(value: float) -> float:
        return 50 + 50 * value / reach

    return {
        "left": place(low),
        "width": place(high) - place(low),
        "point": place(verdict["difference_bits_per_byte"]),
        "margin": place(-verdict["margin"]),
    }


def _sums(corpus: dict[str, Any]) -> dict[str, Any]:
    dropped = sum(corpus["dropped"].values())
    return {
        "dropped": dropped,
        "exact": corpus["documents_in"] == corpus["documents"] + dropped
        and corpus["documents"] == sum(corpus[s]["documents"] for s in ("train", "validation")),
    }
