"""Line charts as inline SVG: no script, colours from the page's custom properties."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 44
MOST_POINTS = 200


@dataclass(frozen=True)
class Series:
    """Points (x, y) drawn as a line of a CSS class, and as dots if ``dots``."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """An SVG of the series over one another, with labelled axes; empty if there is no point."""
    points = [point for one in series for point in one.points]
    if not points:
        return Markup("")
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    low, high = y_range or (min(y for _, y in points), max(y for _, y in points))
    y_ticks = ticks(low, high)

    def x_at(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y_at(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>'
    ]
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        x = x_at(tick)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f'{escape(x_label)}</text><text transform="rotate(-90)" x="{-(HEIGHT - BOTTOM) / 2}" '
        f'y="13" text-anchor="middle">{escape(y_label)}</text>'
    )
    for one in series:
        places = [f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in thin(one.points)]
        parts.append(f'<polyline class="{one.css}" points="{" ".join(places)}"/>')
        if one.dots:
            for place in places:
                x_text, y_text = place.split(",")
                parts.append(f'<circle class="{one.css}" cx="{x_text}" cy="{y_text}" r="3.5"/>')
    return Markup("".join(parts) + "</svg>")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values from at or below ``low`` to at or above ``high`` (Heckbert's nice numbers)."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 10) for index in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS` of the points, the last always among them."""
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = list(points[::every])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept
