"""Recipes: one YAML file per use, checked against the settings of every step before a run."""

import contextlib
import copy
import dataclasses
import difflib
import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nudge.components.common.core.aliases import meant
from nudge.components.common.core.errors import UserError, nearest
from nudge.components.common.core.hardware import PlanSettings
from nudge.components.common.core.recipe import (
    SECTIONS,
    SHARED,
    read_recipe,
    read_yaml,
    step_settings,
)
from nudge.components.common.core.uris import read_text
from nudge.components.common.spending.prices import Budget, Prices
from nudge.pipelines.steps import SETTINGS

FOLDER = Path(__file__).parent
RUN_SECTIONS: dict[str, type[Any]] = {"plan": PlanSettings, "prices": Prices, "budget": Budget}
"""Sections about all steps together."""
TOP = ("name", "title", *SHARED, *SECTIONS, *RUN_SECTIONS)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; ``text`` is its YAML with all overrides applied."""

    name: str
    title: str
    text: str
    values: dict[str, Any]


def shipped() -> dict[str, str]:
    """The recipes that ship with the project: name to title."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: str(read_recipe(text).get("title", "")) for name, text in texts.items()}


def shipped_text(name: str) -> str:
    """The YAML text of a shipped recipe; raises `UserError` with the nearest names."""
    path = FOLDER / f"{name}.yaml"
    if "/" in name or not path.is_file():
        hint = nearest(name, [p.stem for p in FOLDER.glob("*.yaml")])
        raise UserError(f"there is no recipe {name!r} (a file's name ends in .yaml); {hint}")
    return path.read_text(encoding="utf-8")


def load(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a shipped recipe or a file, apply the overrides ``key=value``, and check everything.

    A key is dotted, such as ``train.learning_rate``; its value is YAML. Raises `UserError` with the
    problems of every section.
    """
    path = Path(name_or_path)
    is_file = path.suffix in (".yaml", ".yml") or "/" in name_or_path
    if is_file and not path.is_file():
        raise UserError(f"there is no recipe file {name_or_path}")
    text = read_text(path) if is_file else shipped_text(name_or_path)
    values = read_recipe(text)
    changed = copy.deepcopy(values)
    for override in overrides:
        _set(changed, override)
    if is_file:
        _resolve(changed, path.absolute().parent)
    check(changed)
    if changed != values:
        text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=False, width=100)
    name = str(changed.get("name") or path.stem)
    return Recipe(name, str(changed.get("title", "")), text, changed)


def _resolve(values: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of texts and guards absolute: they are relative to the recipe.

    A path that exists only relative to the current directory stays, because older versions read it
    that way.
    """

    def resolved(uri: Any) -> Any:
        if not isinstance(uri, str) or "://" in uri or uri.startswith(("/", "~", "file:")):
            return uri
        beside = folder / uri
        if not _is_there(beside) and _is_there(Path(uri)):
            return uri
        return str(beside)

    def several(data: Any) -> Any:
        if isinstance(data, list):
            return [resolved(uri) for uri in data]
        if not isinstance(data, str):
            return data
        parts = data.split()
        if len(parts) < 2 or _is_there(folder / data) or _is_there(Path(data)):
            return resolved(data)
        if any(mark in data for mark in "'\"\\"):
            return data
        uris = [resolved(part) for part in parts]
        return uris if uris != parts else data

    ingest = values.get("ingest")
    if isinstance(ingest, dict):
        mix = ingest.get("mix")
        for section in (ingest, *(mix if isinstance(mix, list) else ())):
            if isinstance(section, dict) and section.get("data_uri"):
                section["data_uri"] = several(section["data_uri"])
    evaluate = values.get("evaluate")
    guards = evaluate.get("guards") if isinstance(evaluate, dict) else None
    for guard in guards if isinstance(guards, list) else []:
        if isinstance(guard, dict) and guard.get("uri"):
            guard["uri"] = resolved(guard["uri"])


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or next(glob.iglob(str(path), recursive=True), None) is not None
    except OSError:  # a name that no file can have
        return False


def settings_classes() -> dict[str, type[Any]]:
    """The settings class of each section."""
    return {section: step.settings_class() for section, step in SETTINGS.items()} | RUN_SECTIONS


def check(values: Mapping[str, Any]) -> None:
    """Check every key and value of a recipe; raises `UserError` with one line per problem."""
    problems = [
        f"{key} is not a section or shared value of a recipe; {_top_hint(str(key))}"
        for key in values
        if key not in TOP
    ]
    text = yaml.safe_dump(dict(values))
    parsed: dict[str, Any] = {}
    for section, kind in settings_classes().items():
        try:
            parsed[section] = step_settings(kind, section, text)
        except UserError as error:
            problems += [_elsewhere(line, section) for line in str(error).splitlines()]
    own_tokenizer = "tokenize" in parsed and parsed["tokenize"].tokenizer == "train"
    if own_tokenizer and "train" in parsed and parsed["train"].mode != "scratch":
        problems.append(
            "tokenize.tokenizer: train needs train.mode: scratch, because a base model knows only "
            "the token ids of its own tokenizer"
        )
    if "budget" in parsed and parsed["budget"].cost and not parsed.get("prices", Prices()).known:
        problems.append("budget.cost needs a price, such as prices.gpu_hour or prices.core_hour")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def settings_keys() -> dict[str, list[str]]:
    """The first-level keys of each section."""
    return {
        section: [field.name for field in dataclasses.fields(kind)]
        for section, kind in settings_classes().items()
    }


def dotted_hint(name: str) -> str:
    """A hint for an unknown key, from all sections: ``did you mean 'train.learning_rate'?``; empty
    if no key means the same or is spelled like it."""
    owners: dict[str, list[str]] = {}
    for section, keys in settings_keys().items():
        for key in keys:
            owners.setdefault(key, []).append(f"{section}.{key}")
    close = [name] if name in owners else meant(name, owners)
    close = close or difflib.get_close_matches(name, owners, n=2, cutoff=0.7)
    dotted = [each for key in close for each in ([key] if key in SHARED else owners[key])][:3]
    return "did you mean " + " or ".join(map(repr, dotted)) + "?" if dotted else ""


def _top_hint(key: str) -> str:
    by_spelling = difflib.get_close_matches(key, TOP, n=1, cutoff=0.8)
    return nearest(key, TOP) if by_spelling else dotted_hint(key) or nearest(key, TOP)


def _elsewhere(problem: str, section: str) -> str:
    """A problem with an unknown key, with the section that knows it if another one does."""
    match = re.match(rf"{section}\.(\w+) is not a setting; ", problem)
    if not match:
        return problem
    owners = [other for other, keys in settings_keys().items() if match[1] in keys]
    if not owners:
        return problem
    return f"{match[0]}did you mean {' or '.join(repr(f'{each}.{match[1]}') for each in owners)}?"


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected key=value, such as train.epochs=2")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML: {error}") from None
    # YAML 1.1 reads 1e-4 as a string; nobody who writes it without quotes means a string.
    if isinstance(value, str) and text.strip()[0] not in "'\"":
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"--set {override}: {parent} has no settings below it")
    section[last] = value
