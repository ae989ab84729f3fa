"""The model card of a trained model: only recorded facts."""

from typing import Any

import jinja2

CARD = jinja2.Template(
    """\
---
library_name: transformers
pipeline_tag: text-generation
{% if hub_name %}base_model: {{ hub_name }}
{% endif -%}
tags: [nudge]
---
# A model trained by nudge

Trained from `{{ hub_name or base_model.uri }}` in mode `{{ training.mode }}` for
{{ training.steps }} steps on {{ training.tokens }} tokens,
{{ training.trainable_parameters }} of {{ training.parameters }} parameters. It is meant for text
like its training data; nothing checks that what it says is true.

| fact | value |
|---|---|
| base model, sha256 of its weights | `{{ base_model.sha256 }}` |
| data fingerprint | `{{ data_fingerprint }}` |
| tokenizer, sha256 | `{{ tokenizer_sha256 }}` |
| code | `{{ code_version }}` |
| seed | {{ seed }} |

## Settings
{% for key, value in settings.items() %}
- `{{ key }}`: `{{ value }}`
{%- endfor %}
""",
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


def model_card(facts: dict[str, Any]) -> str:
    """Markdown with the Hugging Face hub's metadata header, from the values of nudge.json.

    The header names the base model only if it has a name on the hub, which the hub links to.
    """
    uri = str(facts["base_model"]["uri"])
    hub_name = uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else ""
    return CARD.render(facts, hub_name=hub_name)
