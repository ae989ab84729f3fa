"""The reference of every setting (docs/settings.md) and the recipes' JSON Schema, from the code.

Types, defaults and limits are those of the settings dataclasses; the meaning of a setting is the
docstring below it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pydantic

from nudge.components.common.core.prices import Prices
from nudge.components.common.core.recipe import SHARED
from nudge.components.deploy.settings import DeploySettings
from nudge.components.evaluate.settings import EvaluateSettings
from nudge.components.ingest.settings import IngestSettings
from nudge.components.register.settings import RegisterSettings
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.train.settings import TrainSettings
from nudge.components.upload.settings import UploadSettings
from nudge.pipelines.plan.settings import PlanSettings

SETTINGS: dict[str, type] = {
    "ingest": IngestSettings,
    "tokenize": TokenizeSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "upload": UploadSettings,
    "register": RegisterSettings,
    "deploy": DeploySettings,
    "plan": PlanSettings,
    "prices": Prices,
}

Schema = dict[str, Any]

LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}

UNITS = {
    "s": "seconds",
    "hours": "hours",
    "minutes": "minutes",
    "bytes": "bytes",
    "megabytes": "megabytes",
    "characters": "characters",
    "documents": "documents",
    "tokens": "tokens",
    "sequences": "sequences",
    "steps": "optimizer steps",
    "every": "optimizer steps",
    "epochs": "passes over the training tokens",
    "share": "fraction from 0 to 1",
    "length": "tokens",
    "window": "tokens",
    "stride": "tokens",
}
"""The unit that a word of a setting's name says."""

PAGE = jinja2.Environment(
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
).from_string(
    """\
# Settings

Every key of a recipe, by step. `nudge compile` writes this page from the settings dataclasses in
`components/*/settings.py`; `recipe.schema.json` beside it is the same as a JSON Schema, with which
an editor completes and checks recipes. Put this line at the top of one:

```yaml
# yaml-language-server: $schema=PATH/TO/docs/recipe.schema.json
```

{{ shared }} may be at the top level of a recipe
instead of in each section that has them. Any key can be set for one run:
`nudge run RECIPE --set train.learning_rate=2e-4`.
{% for section, rows in sections.items() %}

## {{ section }}

| key | type | default | meaning |
|---|---|---|---|
{% for row in rows %}
| `{{ row.key }}` | {{ row.type }} | {{ row.default }} | {{ row.meaning }} |
{% endfor %}
{% endfor %}
"""
)


@dataclass(frozen=True)
class Row:
    """One setting as the page shows it."""

    key: str
    type: str
    default: str
    meaning: str

    @property
    def unit(self) -> str:
        """The unit of a number, from the key's name; empty if it has none."""
        if not self.type.startswith(("number", "integer")):
            return ""
        words = self.key.rpartition(".")[2].split("_")
        return next((unit for word, unit in UNITS.items() if word in words), "")


def reference() -> dict[str, list[Row]]:
    """Every setting, nested ones included, by section."""
    return {name: list(_rows(_schema(kind), name)) for name, kind in SETTINGS.items()}


def pages(root: Path) -> dict[Path, str]:
    """The reference and the schema, by their paths below ``root``, a checkout."""
    sections = reference()
    shared = ", ".join(f"`{key}`" for key in SHARED)
    schema = json.dumps(recipe_schema(), indent=1) + "\n"
    return {
        root / "docs" / "settings.md": PAGE.render(sections=sections, shared=shared),
        root / "docs" / "recipe.schema.json": schema,
    }


def recipe_schema() -> Schema:
    """The JSON Schema of a recipe; required keys may also come from a pipeline's parameters."""
    definitions: Schema = {}
    properties: Schema = {
        "name": {"type": "string", "description": "The recipe's name in lists and results."},
        "title": {"type": "string", "description": "One line that says what the recipe does."},
    }
    for section, kind in SETTINGS.items():
        schema = _schema(kind)
        definitions |= schema.pop("$defs", {})
        for key in SHARED:
            if key in schema["properties"]:
                properties[key] = schema["properties"][key]
        schema.pop("required", None)
        properties[section] = schema
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nudge recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": definitions,
    }


def _schema(kind: type) -> Schema:
    return pydantic.TypeAdapter(kind).json_schema()


def _rows(schema: Schema, prefix: str, definitions: Schema | None = None) -> Iterator[Row]:
    definitions = schema.get("$defs", {}) if definitions is None else definitions
    for name, field in schema["properties"].items():
        key = f"{prefix}.{name}"
        required = name in schema.get("required", ())
        default = "required" if required else _default(field)
        meaning = " ".join(str(field.get("description", "")).replace("``", "`").split())
        yield Row(key, _type(field, definitions), default, meaning.replace("|", "\\|"))
        for suffix, nested in _nested(field, definitions):
            yield from _rows(nested, key + suffix, definitions)


def _nested(field: Schema, definitions: Schema) -> Iterator[tuple[str, Schema]]:
    """The settings classes within a field, with what their keys add to the field's own."""
    if "$ref" in field:
        yield "", definitions[field["$ref"].rpartition("/")[2]]
    for each in field.get("anyOf", ()):
        yield from _nested(each, definitions)
    if isinstance(field.get("items"), dict):
        yield from (
            ("[]" + suffix, nested) for suffix, nested in _nested(field["items"], definitions)
        )


def _default(field: Schema) -> str:
    if "default" not in field:
        return ""
    value = field["default"]
    return "none" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(field: Schema, definitions: Schema) -> str:
    if "enum" in field:
        return ", ".join(f"`{each}`" for each in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return "mapping"
    if "anyOf" in field:
        return " or ".join(_type(each, definitions) for each in field["anyOf"])
    kind = str(field.get("type", "any"))
    if kind == "array":
        items = field.get("items")
        inner = _type(items, definitions) if isinstance(items, dict) and items else ""
        kind = f"list of {inner}" if inner else "list"
    names = {"object": "mapping", "null": "none", "boolean": "true or false"}
    limits = [text.format(field[key]) for key, text in LIMITS.items() if key in field]
    return ", ".join([names.get(kind, kind), *limits]).replace("|", "\\|")
