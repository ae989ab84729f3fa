"""The model card of a trained model: only recorded facts."""

from typing import Any

import jinja2

CARD = jinja2.Template(
    """\
---
library_name: transformers
pipeline_tag: text-generation
base_model: {{ base_model.uri }}
tags: [nudge]
---
# A model trained by nudge

Trained from `{{ base_model.uri }}` in mode `{{ training.mode }}` for {{ training.steps }} steps on
{{ training.tokens }} tokens, {{ training.trainable_parameters }} of {{ training.parameters }}
parameters. It is meant for text like its training data; nothing checks that what it says is true.

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
    """Markdown with the Hugging Face hub's metadata header, from the values of nudge.json."""
    return CARD.render(facts)
