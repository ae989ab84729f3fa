"""The settings reference and the recipes' JSON Schema follow the settings dataclasses."""

import dataclasses
from typing import Any

import jsonschema_rs
import pytest
import yaml

from nudge.pipelines import recipes
from nudge.pipelines.settings_reference import recipe_schema


def leaves(schema: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    return {f"{prefix}{name}": field for name, field in schema["properties"].items()}


def test_every_setting_has_a_meaning() -> None:
    schema = recipe_schema()
    fields: dict[str, Any] = {}
    for section in recipes.settings_classes():
        fields |= leaves(schema["properties"][section], f"{section}.")
    for name, definition in schema["$defs"].items():
        fields |= leaves(definition, f"{name}.")
    assert len(fields) > 150
    assert [key for key, field in fields.items() if not field.get("description")] == []


def test_every_section_and_field_is_there() -> None:
    schema = recipe_schema()
    for section, kind in recipes.settings_classes().items():
        names = {field.name for field in dataclasses.fields(kind)}
        assert set(schema["properties"][section]["properties"]) == names


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_follow_the_schema(name: str) -> None:
    values = yaml.safe_load(recipes.shipped_text(name))
    jsonschema_rs.validator_for(recipe_schema()).validate(values)


@pytest.mark.parametrize(
    "values", [{"train": {"learning_rat": 1}}, {"train": {"mode": "fast"}}, {"trian": {}}]
)
def test_wrong_recipes_do_not(values: dict[str, Any]) -> None:
    assert not jsonschema_rs.validator_for(recipe_schema()).is_valid(values)
