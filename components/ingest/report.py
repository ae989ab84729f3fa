"""The page that `ingest` leaves: what came in, what was dropped and why, what is left."""

from typing import Any

import jinja2

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
    """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Corpus</title>
<style>
:root { color-scheme: light dark; --line: #8884; --bar: #3b78c4; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 48rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; white-space: nowrap; }
.bar { background: var(--bar); height: .8rem; border-radius: 2px; min-width: 1px; }
blockquote { margin: .5rem 0; padding-left: .8rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; }
</style></head><body>
<h1>Corpus</h1>
<p><strong>{{ counts.documents }}</strong> of {{ counts.documents_in }} documents kept,
{{ counts.bytes }} bytes of text: {{ counts.train_documents }} to train on,
{{ counts.validation_documents }} held out. Fingerprint <code>{{ fingerprint }}</code>.</p>
<h2>Dropped</h2>
{% if counts.dropped %}
<table><tr><th>reason</th><th class="n">documents</th></tr>
{% for reason, number in counts.dropped.items() %}
<tr><td>{{ reason }}</td><td class="n">{{ number }}</td></tr>
{% endfor %}</table>
{% for reason, examples in samples.items() %}
<details><summary>{{ reason }}: some of them</summary>
{% for example in examples %}<blockquote>{{ example }}</blockquote>{% endfor %}</details>
{% endfor %}
{% else %}<p>Nothing.</p>{% endif %}
<h2>Sources</h2>
<table><tr><th>source</th><th class="n">in</th><th class="n">kept</th><th>dropped</th></tr>
{% for source in counts.sources %}
<tr><td>{{ source.uri }}</td><td class="n">{{ source.documents_in }}</td>
<td class="n">{{ source.documents }}</td>
<td>{% for reason, number in source.dropped.items() %}
{{ reason }} {{ number }}{{ ", " if not loop.last }}{% endfor %}</td></tr>
{% endfor %}</table>
<h2>Lengths</h2>
<table><tr><th>characters</th><th></th><th class="n">documents</th></tr>
{% for low, number, share in lengths %}
<tr><td>{{ low }} to {{ 2 * low - 1 }}</td>
<td style="width:50%"><div class="bar" style="width:{{ share }}%"></div></td>
<td class="n">{{ number }}</td></tr>
{% endfor %}</table>
<h2>Some held-out documents</h2>
{% for text in held_out %}
<blockquote>{{ text }}</blockquote>{% endfor %}
</body></html>
"""
)


def render_report(
    counts: dict[str, Any],
    fingerprint: str,
    lengths: dict[int, int],
    samples: dict[str, list[str]],
    held_out: list[str],
) -> str:
    """One self-contained HTML page; everything from data is escaped.

    ``lengths`` counts documents by the power of two of characters that they reach.
    """
    most = max(lengths.values())
    bars = [(low, n, round(100 * n / most)) for low, n in lengths.items()]
    return PAGE.render(
        counts=counts, fingerprint=fingerprint, held_out=held_out, samples=samples, lengths=bars
    )
