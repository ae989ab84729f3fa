"""The page that `ingest` writes: what was read, what was dropped and why, and what is left."""

from typing import Any

import jinja2

from nudge.components.common.core.sanitize import CSP, visible
from nudge.components.ingest.account import with_hints

SOURCES_SHOWN = 200


def _finalize(value: Any) -> Any:
    if isinstance(value, int):
        return f"{value:,}"
    return visible(value) if type(value) is str else value


PAGE = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    finalize=_finalize,
).from_string(
    """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ csp }}">
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
<p><strong>{{ counts.documents }}</strong> of {{ counts.documents_in }} documents kept
{{- " (" ~ counts.conversations ~ " conversations)" if counts.conversations else "" }},
{{ counts.bytes }} bytes of text: {{ counts.train_documents }} to train on,
{{ counts.validation_documents }} held out.{% if counts.encodings %}
Encodings other than UTF-8:
{% for name, number in counts.encodings.items() %}{{ number }} {{ name }}
{{- ", " if not loop.last }}{% endfor %}.{% endif %} Fingerprint <code>{{ fingerprint }}</code>.</p>
<h2>Where it went</h2>
<table><tr><th></th><th class="n">documents</th><th class="n">bytes of text</th></tr>
<tr><td>read</td><td class="n">{{ counts.documents_in }}</td>
<td class="n">{{ counts.text_bytes_in }}</td></tr>
{% for reason, number in counts.dropped.items() %}
<tr><td>dropped: {{ reason }}{% if examples[reason] %} <small>({{ examples[reason] | join(" ") }})
</small>{% endif %}</td><td class="n">{{ number }}</td>
<td class="n">{{ counts.dropped_bytes[reason] }}</td></tr>
{% endfor %}
<tr><td>kept</td><td class="n">{{ counts.documents }}</td>
<td class="n">{{ counts.text_bytes_kept }}</td></tr>
</table>
<p>Cleaning turned the {{ counts.text_bytes_kept }} bytes that are kept into {{ counts.bytes }}.
A document that could not be read counts with its stored bytes, or with 0 if damage hides its
size.</p>
{% for reason, examples in samples.items() %}
<details><summary>{{ reason }}: some of them</summary>
{% for example in examples %}<blockquote>{{ example }}</blockquote>{% endfor %}</details>
{% endfor %}
<h2>Sources</h2>
<table><tr><th>source</th><th class="n">in</th><th class="n">kept</th><th>dropped</th></tr>
{% for source in counts.sources[:sources_shown] %}
<tr><td>{{ source.uri }}</td>
<td class="n">{{ source.documents_in }}<br><small>{{ source.text_bytes_in }} B</small></td>
<td class="n">{{ source.documents }}<br><small>{{ source.text_bytes_kept }} B</small></td>
<td>{% for reason, number in source.dropped.items() %}
{{ reason }} {{ number }} <small>({{ source.dropped_bytes[reason] }} B)</small>
{{- ", " if not loop.last }}{% endfor %}</td></tr>
{% endfor %}</table>
{% if counts.sources | length > sources_shown %}
<p>{{ counts.sources | length - sources_shown }} more sources are in the corpus's manifest.</p>
{% endif %}
{% if counts.mix %}
<h2>Mix</h2>
<table><tr><th>source</th><th class="n">weight</th><th class="n">to train on</th>
<th class="n">held out</th></tr>
{% for part in counts.mix %}
<tr><td>{{ part.name }}</td><td class="n">{{ part.weight }}</td>
<td class="n">{{ part.train_documents }}</td><td class="n">{{ part.validation_documents }}</td></tr>
{% endfor %}</table>
{% endif %}
{% for title, groups in (("Licenses", counts.licenses), ("Origins", counts.origins)) if groups %}
<h2>{{ title }}</h2>
<table><tr><th>value</th><th class="n">documents kept</th><th class="n">bytes</th></tr>
{% for group in groups %}
<tr><td>{% if group.value %}{{ group.value }}{% elif "others" in group %}
{{ group.others }} others{% else %}no value{% endif %}</td>
<td class="n">{{ group.documents }}</td><td class="n">{{ group.bytes }}</td></tr>
{% endfor %}</table>
{% endfor %}
<h2>Languages</h2>
<p>A sample of {{ counts.languages.values() | sum }} kept documents, drawn by the hash of their
text.</p>
<table><tr><th>language</th><th></th><th class="n">documents</th></tr>
{% for language, number in counts.languages.items() %}
<tr><td>{{ language }}</td><td style="width:50%"><div class="bar"
 style="width:{{ 100 * number // (counts.languages.values() | max) }}%"></div></td>
<td class="n">{{ number }}</td></tr>
{% endfor %}</table>
<h2>Lengths</h2>
<table><tr><th>characters</th><th></th><th class="n">documents</th></tr>
{% for low, number, share in lengths %}
<tr><td>{{ low }} to {{ 2 * low - 1 }}</td>
<td style="width:50%"><div class="bar" style="width:{{ share }}%"></div></td>
<td class="n">{{ number }}</td></tr>
{% endfor %}</table>
<h2>Some held-out documents</h2>
<p>The hash of its text decides whether a document is held out, so documents keep their split as the
corpus grows, and near duplicates share one split. The split of a document that was edited since the
last run is drawn afresh: a model that continues from the last one may know its old form, unless the
old form is still among the sources.</p>
{% for text in held_out %}
<blockquote>{{ text }}</blockquote>{% endfor %}
</body></html>
"""
)
PAGE.globals["csp"] = CSP


def render_report(
    counts: dict[str, Any],
    fingerprint: str,
    lengths: dict[int, int],
    samples: dict[str, list[str]],
    held_out: list[str],
) -> str:
    """One self-contained HTML page; everything that comes from data is escaped.

    ``lengths`` counts documents by their length in characters, rounded down to a power of two.
    """
    most = max(lengths.values())
    bars = [(low, n, round(100 * n / most)) for low, n in lengths.items()]
    return PAGE.render(
        counts={"licenses": [], "origins": [], "mix": [], "conversations": 0, **counts},
        fingerprint=fingerprint,
        held_out=held_out,
        samples=samples,
        examples={reason: with_hints(counts, reason) for reason in counts["dropped"]},
        lengths=bars,
        sources_shown=SOURCES_SHOWN,
    )
