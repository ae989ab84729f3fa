"""A recipe as text: shared values and one section of settings per step, in YAML.

The recipe is a parameter of the pipeline, so that a run started from a dashboard carries every
setting with it: as YAML text, or as the URI of a file. Each step reads its own section here.

Text that travels as a parameter passes through programs that replace parts of it. `portable` writes
a recipe so that none of them finds anything to replace; a file needs no such care.
"""

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nudge.components.common.clients.store import open_store
from nudge.components.common.core.environment import POD_NAME, RUN_ID
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file
from nudge.components.common.core.settings import parse
from nudge.components.common.core.uris import local_path, read_text

T = TypeVar("T")

SHARED = ("base_model", "model_name", "seed")
"""Top-level values that every step whose settings declare them receives."""

SECTIONS = ("ingest", "tokenize", "train", "evaluate", "upload", "register", "deploy", "notify")

URI_SCHEMES = ("package://", "file://", "s3://")
"""A recipe that begins with one of these names a file; any other is YAML text."""

STORED = re.compile(r"/nudge/recipes/([0-9a-f]{64})\.yaml$")
"""The end of the URI of a recipe that was too long for a parameter: its sha256 is its name."""

REPLACED = re.compile(
    r"(?<=\{)\{|(?<=\[)\[|\$|(?<=python)3|/(?=kfp-workspace)|[^\x20-\x7e]", re.DOTALL
)
"""Characters that some program on the way gives a meaning, by program: Argo, the launcher and
kfp.local replace ``{{...}}``; the server and its schedules ``[[...]]``; the kubelet ``$(NAME)`` and
``$$`` in a container's arguments; kfp.local ``python3`` and ``/kfp-workspace``. A database with a
narrow character set refuses what is not ASCII."""

WORKFLOW = re.compile(r"(.+?)-(?:retry-)?system-container-impl-\d+")
"""A step's pod: the name of the run's Workflow, the template's name and a number."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which PyYAML takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            first = known.setdefault((key.tag, key.value), key)
            if first is not key:
                lines = [each.start_mark.line + 1 for each in (first, key)]
                problem = f"{key.value!r} is given twice, in line {lines[0]} and line {lines[1]}"
                raise yaml.MarkedYAMLError(problem=f"{problem}; keep one")
        return node


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text; raises `yaml.YAMLError`, also for a duplicate key."""
    return yaml.load(text, _Loader)


def read_recipe(recipe: str) -> dict[str, Any]:
    """The plain values of a recipe: YAML text, or a ``package://``, ``file://`` or ``s3://`` URI.

    Raises `UserError` if the file is missing or cannot be read, if the YAML is not a mapping or
    has a number that is not finite, or if the text should have gone through `portable`.
    """
    if recipe.startswith(URI_SCHEMES):
        text = _file_text(recipe)
    else:
        _refuse_replaced(recipe)
        text = recipe
    return _parsed(text)


def _parsed(text: str) -> dict[str, Any]:
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"the recipe is not valid YAML: {error}") from None
    if values is None:
        raise UserError(
            "the recipe is empty; start from a shipped one (`nudge recipes` lists them)"
        )
    if not isinstance(values, dict):
        raise UserError(f"the recipe is a YAML {type(values).__name__}, expected a mapping")
    if wrong := [f"{key} = {value}: expected a finite number" for key, value in _infinite(values)]:
        raise UserError("\n".join(wrong))
    return values


def portable(recipe: str) -> str:
    """A recipe that can travel as a parameter: ASCII that nothing on the way replaces.

    It has the same values. Text that is already safe and URIs are returned unchanged; other text
    loses its comments. Raises `UserError` as `read_recipe` does.
    """
    if recipe.startswith(URI_SCHEMES) or not REPLACED.search(recipe.replace("\n", "")):
        return recipe
    return yaml.dump(
        _parsed(recipe), Dumper=_Dumper, sort_keys=False, width=math.inf, allow_unicode=False
    )


class _Dumper(yaml.SafeDumper):
    """Puts strings with characters to escape into double quotes, and escapes them there."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def write_double_quoted(self, text: str, split: bool = True) -> None:
        self.write_indicator('"', True)
        # PyYAML's own escapes, character by character; splitting a line would fold blanks.
        made = [_escaped(text, at) for at in range(len(text))]
        self.column += sum(map(len, made))
        self.stream.write("".join(made))
        self.write_indicator('"', False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if REPLACED.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _escaped(text: str, at: int) -> str:
    character = text[at]
    if character in '"\\':
        return f"\\{character}"
    if not REPLACED.match(text, at):
        return character
    code = ord(character)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def _file_text(uri: str) -> str:
    if uri.startswith("s3://"):
        folder, _, name = uri.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "recipe"
            open_store(folder).get(name, path)
            digest = STORED.search(uri)
            if digest and sha256_file(path) != digest[1]:
                raise UserError(
                    f"the recipe {uri} is not the one that was submitted: somebody changed it in "
                    "the bucket; submit the run again"
                )
            return read_text(path)
    path = local_path(uri)
    if not path.is_file():
        raise UserError(f"the recipe {uri} does not exist")
    return read_text(path)


def _refuse_replaced(text: str) -> None:
    """Raise `UserError` for text in a pod that the server has altered, or may have.

    Only text that was typed into a dashboard contains it; `portable` escapes it.
    """
    pod = os.environ.get(POD_NAME, "")
    if not pod:
        return
    workflow = match[1] if (match := WORKFLOW.fullmatch(pod)) else ""
    # Nobody knows these before the run starts, so Argo or the server must have put them there.
    names = {"{{workflow.name}}": workflow, "[[RunUUID]]": os.environ.get(RUN_ID, "")}
    found = [f"{typed} (now {name})" for typed, name in names.items() if name and name in text]
    found += re.findall(r"\{\{[^{}\n]*\}?\}?", text)
    if found:
        raise UserError(
            f"the recipe was given as text with {', '.join(found)}, and the pipelines server "
            "replaces such text; start the run with `nudge submit`, which escapes it, or write "
            r'"{\x7b" for "{{" in double quotes ("[\x5b" for "[["), or use the URI of a file'
        )


def _infinite(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """The keys of numbers that are infinite or not a number."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _infinite(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for at, each in enumerate(value):
            yield from _infinite(each, f"{path}.{at}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, value


def step_settings(kind: type[T], section: str, recipe: str, **overrides: Any) -> T:
    """The settings ``kind`` of the step ``section``, from the recipe's text.

    ``overrides`` are values that take precedence, such as pipeline parameters; an empty string
    means "as the recipe says". Raises `UserError` as `parse` does.
    """
    return parse(kind, _values(kind, section, recipe, overrides), section)


def some_settings(kind: type[T], section: str, recipe: str, **overrides: Any) -> T:
    """The same for a step that reads a few keys of another step's section and ignores the rest."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = _values(kind, section, recipe, overrides)
    return parse(kind, {key: each for key, each in values.items() if key in known}, section)


def _values(kind: type, section: str, recipe: str, overrides: dict[str, Any]) -> dict[str, Any]:
    values = read_recipe(recipe)
    known = {field.name for field in dataclasses.fields(kind)}
    merged = {key: values[key] for key in SHARED if key in values and key in known}
    own = values.get(section) or {}
    if not isinstance(own, dict):
        kind_name = type(own).__name__
        raise UserError(f"{section} is a YAML {kind_name}, expected a mapping of settings")
    merged |= own
    merged |= {key: value for key, value in overrides.items() if value != ""}
    return merged
