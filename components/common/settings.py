"""Settings: frozen, validated dataclasses made from a recipe's plain values.

A step declares its settings with ``@settings`` and builds them with ``parse``; a wrong value ends
in a `UserError` that names the key, what was given and what is accepted.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import pydantic
from nudge.components.common.errors import UserError, nearest
from pydantic.dataclasses import dataclass as validated_dataclass

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass whose field types are checked."""
    config = pydantic.ConfigDict(extra="forbid")
    made: Any = validated_dataclass(config=config, frozen=True, kw_only=True)(cls)
    return made  # type: ignore[no-any-return]


def parse(kind: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """Build the settings class ``kind`` from plain values.

    ``where`` is the key under which the values stand in the recipe, such as ``train``.
    Raises `UserError` that lists every problem, unknown keys with their nearest neighbours.
    """
    given = dict(values or {})
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    problems = [
        f"{where}.{key} is not a setting; {nearest(key, known)}"
        for key in given.keys() - set(known)
    ]
    if problems:
        raise UserError("\n".join(sorted(problems)))
    try:
        return kind(**given)
    except pydantic.ValidationError as error:
        raise UserError("\n".join(_sentence(where, item) for item in error.errors())) from None


def _sentence(where: str, problem: Any) -> str:
    key = ".".join([where, *(str(part) for part in problem["loc"])])
    if problem["type"] == "missing":
        return f"{key} is required and was not given"
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{message[0].lower()}{message[1:]}"
    # What is wrong between several values has no key and no value of its own.
    return f"{key} = {problem['input']!r}: {message}" if problem["loc"] else f"{key}: {message}"
