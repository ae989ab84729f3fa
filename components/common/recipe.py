"""A recipe as text: shared values and one section of settings a step, in YAML.

The text itself is what travels (it is a parameter of the pipeline), so that a run started from a
dashboard carries every setting with it. Each step takes its own section out of it here.
"""

import dataclasses
from typing import Any, TypeVar

import yaml
from nudge.components.common.errors import UserError
from nudge.components.common.settings import parse
from nudge.components.common.uris import local_path, read_text

T = TypeVar("T")

SHARED = ("base_model", "model_name", "seed")
"""Top-level values that every step whose settings declare them receives."""

SECTIONS = ("ingest", "tokenize", "train", "evaluate", "upload", "register", "deploy")


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which PyYAML takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = known.setdefault((key.tag, key.value), key)
            if first is not key:
                lines = [each.start_mark.line + 1 for each in (first, key)]
                told = f"{key.value!r} stands twice, in line {lines[0]} and line {lines[1]}"
                raise yaml.MarkedYAMLError(problem=f"{told}; keep one")
        return node


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text; raises `yaml.YAMLError`, also for a key that is doubled."""
    return yaml.load(text, _Loader)


def read_recipe(recipe: str) -> dict[str, Any]:
    """The plain values of a recipe: YAML text, or a ``package://`` or ``file://`` URI of a file.

    Raises `UserError` if the file is missing or cannot be read, or the YAML is not a mapping.
    """
    text = recipe
    if recipe.startswith(("package://", "file://")):
        path = local_path(recipe)
        if not path.is_file():
            raise UserError(f"the recipe {recipe} is not there")
        text = read_text(path)
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"the recipe is not valid YAML: {error}") from None
    if values is None:
        raise UserError("the recipe is empty; the shipped ones (`nudge recipes`) are a start")
    if not isinstance(values, dict):
        raise UserError(f"the recipe is a YAML {type(values).__name__}, expected a mapping")
    return values


def step_settings(kind: type[T], section: str, recipe: str, **given: Any) -> T:
    """The settings ``kind`` of the step ``section``, from the recipe's text.

    ``given`` are values that stand above the recipe, such as pipeline parameters; an empty string
    means "as the recipe says". Raises `UserError` as `parse` does.
    """
    return parse(kind, _values(kind, section, recipe, given), section)


def some_settings(kind: type[T], section: str, recipe: str, **given: Any) -> T:
    """The same for a step that reads a few keys of another's section: the others are left to it."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = _values(kind, section, recipe, given)
    return parse(kind, {key: each for key, each in values.items() if key in known}, section)


def _values(kind: type, section: str, recipe: str, given: dict[str, Any]) -> dict[str, Any]:
    values = read_recipe(recipe)
    known = {field.name for field in dataclasses.fields(kind)}
    merged = {key: values[key] for key in SHARED if key in values and key in known}
    given_here = values.get(section) or {}
    if not isinstance(given_here, dict):
        kind_name = type(given_here).__name__
        raise UserError(f"{section} is a YAML {kind_name}, expected a mapping of settings")
    merged |= given_here
    merged |= {key: value for key, value in given.items() if value != ""}
    return merged
