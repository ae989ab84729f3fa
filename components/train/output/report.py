"""The report of `train`: loss, learning rate, speed and settings. Static HTML and SVG."""

import json
from collections.abc import Sequence
from typing import Any

import jinja2

from nudge.components.common.core.sanitize import CSP, visible

DRAWN_POINTS = 400
"""Maximum points per line; longer lines are thinned evenly."""

PAGE = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: visible(value) if type(value) is str else value,
).from_string(
    """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Training</title>
<meta http-equiv="Content-Security-Policy" content="{{ csp }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1c1f23; --paper: #fbfaf7; --line: #dcdad3;
  --new: #1f5fa8; --old: #b05a10; --muted: #5a6068; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e8ea; --paper: #14171a; --line: #353b42;
  --new: #78b0f0; --old: #e8a45c; --muted: #a4abb4; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 52rem; margin: 1.5rem auto;
  padding: 0 1rem; color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .2rem; }
p { margin: .3rem 0; } .note { color: var(--muted); font-size: .875rem; }
svg { display: block; width: 100%; height: 12rem; border: solid var(--line);
  border-width: 0 0 1px 1px; }
svg.low { height: 5rem; }
path { fill: none; stroke: var(--new); stroke-width: 2; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; }
path.validation { stroke: var(--old); stroke-width: 3; }
.validation { color: var(--old); } .trained { color: var(--new); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .5rem;
  border-bottom: 1px solid var(--line); font-weight: 400; }
th { color: var(--muted); width: 40%; }
</style></head><body>
<h1>Training</h1>
<p>{{ summary }}</p>
<h2>Loss, nats per token</h2>
<p class="note"><span class="trained">training</span>, from {{ loss.first }} to {{ loss.last }}
{%- if validation %}; <span class="validation">held-out text</span>, from {{ validation.first }} to
{{ validation.last }}{% endif %}. Drawn from {{ loss.low }} to {{ loss.high }}, over
{{ steps }} steps.</p>
<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="loss by step">
<path d="{{ loss.path }}"/>
{% if validation %}<path class="validation" d="{{ validation.path }}"/>{% endif %}
</svg>
{% for title, drawn in others %}
<h2>{{ title }}</h2>
<p class="note">From {{ drawn.first }} to {{ drawn.last }}, drawn from {{ drawn.low }} to
{{ drawn.high }}.</p>
<svg class="low" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img"
aria-label="{{ title }} by step"><path d="{{ drawn.path }}"/></svg>
{% endfor %}
<h2>The run</h2>
<table>{% for name, value in facts.items() %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Settings</h2>
<table>{% for name, value in settings.items() %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
</body></html>
"""
)
PAGE.globals["csp"] = CSP


def render_report(facts: dict[str, Any], lines: dict[str, list[str]]) -> str:
    """The report as HTML, from the values of nudge.json and the lines of metrics.jsonl."""
    values = [json.loads(line) for line in lines["metrics.jsonl"]]
    training = facts["training"]
    losses, validation = _points(values, "loss"), _points(values, "validation_loss")
    both = [y for _, y in losses + validation]
    limits = (min(both), max(both))
    width = max(1, training["steps"])
    others = [
        (title, _line(points, width))
        for title, name in (
            ("Learning rate", "lr"),
            ("Gradient norm before clipping", "grad_norm"),
            ("Tokens per second", "tokens_per_s"),
        )
        if (points := _points(values, name))
    ]
    last = [value for value in values if "loss" in value][-1]
    return PAGE.render(
        summary=(
            f"{training['steps']} steps on {training['tokens']:,} tokens in "
            f"{training['seconds']:,.0f} s, {training['tokens_per_s']:,.1f} tokens/s, on "
            f"{training['ranks']} x {training['device']}; the model has the weights of step "
            f"{training['weights_of_step']}."
        ),
        loss=_line(losses, width, limits),
        validation=_line(validation, width, limits) if validation else None,
        others=others,
        steps=training["steps"],
        facts={
            "mode": training["mode"],
            "base model": facts["base_model"]["uri"] or "none: fresh weights",
            "parameters": f"{training['parameters']:,}",
            "parameters trained": f"{training['trainable_parameters']:,}, "
            f"{training['decayed_parameters']:,} of them with weight decay",
            "share of the hardware's peak (MFU)": _share(last["mfu"]),
            "share of time waiting for data": _share(last["data_wait_share"]),
            "peak memory": f"{last['memory_bytes'] / 2**20:,.0f} MiB",
            **_quantization(training, facts["settings"]),
            **_served(training.get("served")),
            "data": facts["data_fingerprint"],
            "tokenizer": facts["tokenizer_sha256"],
            "code": facts["code_version"],
        },
        settings=facts["settings"],
    )


def _quantization(training: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """What quantizing the base model cost, if it was quantized."""
    before, after = (training.get(f"{name}_bits_per_byte") for name in ("base", "quantized"))
    if before is None or after is None:
        return {}
    return {
        f"cost of the {settings['base_dtype']} base before training": f"{after - before:+.4f} bits "
        f"per byte of held-out text ({before:.4f} with its own weights, {after:.4f} quantized)"
    }


def _served(served: dict[str, Any] | None) -> dict[str, str]:
    """What quantizing the model for serving saved and cost, if it was quantized."""
    if served is None:
        return {}
    before, after = served["bytes_before"], served["bytes_after"]
    first, last = served["bits_per_byte_before"], served["bits_per_byte_after"]
    return {
        f"saved by {served['kind']} weights": f"{before - after:,} of {before:,} bytes "
        f"({_share(1 - after / before)})",
        f"cost of {served['kind']} weights": f"{last - first:+.4f} bits per byte of held-out text "
        f"({first:.4f} as trained, {last:.4f} quantized)",
    }


def _points(values: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(value["step"], value[name]) for value in values if value.get(name) is not None]


def _line(
    points: list[tuple[int, float]], width: int, limits: tuple[float, float] | None = None
) -> dict[str, str]:
    """An SVG path in a box of 1000 x 100, and its first, last, low and high figures as text."""
    low, high = limits or (min(y for _, y in points), max(y for _, y in points))
    height = high - low or 1.0
    thin = points[:: -(-len(points) // DRAWN_POINTS)] + points[-1:]
    points_text = [f"{1000 * x / width:.1f},{100 - 100 * (y - low) / height:.2f}" for x, y in thin]
    figures = {"first": points[0][1], "last": points[-1][1], "low": low, "high": high}
    return {"path": "M" + "L".join(points_text)} | {k: f"{v:.4g}" for k, v in figures.items()}


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"
