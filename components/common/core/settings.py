"""Settings: frozen, validated dataclasses made from a recipe's plain values.

A step declares its settings with ``@settings`` and builds them with ``parse``. For a wrong value
that raises a `UserError` with the key, the value and what is accepted.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as validated_dataclass

from nudge.components.common.core.aliases import meant
from nudge.components.common.core.errors import UserError, nearest

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass whose field types are checked."""
    config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)
    made: Any = validated_dataclass(config=config, frozen=True, kw_only=True)(cls)
    return made  # type: ignore[no-any-return]


def parse(kind: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """Build the settings class ``kind`` from plain values.

    ``where`` is the key of the values in the recipe, such as ``train``. Raises `UserError` that
    lists every problem; an unknown key comes with the nearest known one.
    """
    named = {str(key): value for key, value in (values or {}).items()}
    try:
        return kind(**named)
    except pydantic.ValidationError as error:
        problems = [_sentence(kind, where, item) for item in error.errors()]
        raise UserError("\n".join(problems)) from None


def _sentence(kind: type, where: str, problem: Any) -> str:
    key = ".".join([where, *(str(part) for part in problem["loc"])])
    if problem["type"] == "missing":
        return f"{key} is required but missing"
    if problem["type"] == "unexpected_keyword_argument":
        *parents, last = problem["loc"]
        known = _known(kind, parents)
        return f"{key} is not a setting; {nearest(str(last), known, meant(str(last), known))}"
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{message[0].lower()}{message[1:]}"
    # A conflict between several values has no key and no value of its own.
    return f"{key} = {problem['input']!r}: {message}" if problem["loc"] else f"{key}: {message}"


def _known(kind: type, path: Sequence[str | int]) -> list[str]:
    """The settings of the class that ``path`` leads to from ``kind``, by names and positions."""
    for part in path:
        if isinstance(part, str):
            kind = next(_classes(typing.get_type_hints(kind)[part]))
    return [field.name for field in dataclasses.fields(kind)]


def _classes(hint: Any) -> Iterator[type]:
    """The settings classes in a type, such as that of ``list[Guard]`` or ``Probe | None``."""
    if dataclasses.is_dataclass(hint):
        yield typing.cast(type, hint)
    for each in typing.get_args(hint):
        yield from _classes(each)
