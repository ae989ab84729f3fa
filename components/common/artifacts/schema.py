"""Typed artifacts: a frozen dataclass for each JSON format, read and written here.

A format is a plain dataclass with the class variables ``FORMAT`` and ``VERSION``. A reader ignores
keys that it does not know, which a later release of the same version may add, and takes the default
of a field that an earlier release did not write. Keys keep their names on disk whatever the field
is called (``Field(alias=...)``), and NaN and infinity, which JSON does not have, become null.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import pydantic

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import read_manifest, write_manifest

T = TypeVar("T")
Omitted = Annotated[T | None, pydantic.Field(exclude_if=lambda value: value is None)]
"""The type of a field that is left out of the JSON while it is None."""

adapter: Callable[[Any], pydantic.TypeAdapter[Any]] = functools.cache(pydantic.TypeAdapter)
"""Converts a dataclass from and to JSON values; one per class."""


class Artifact(Protocol):
    """A format with its name and version."""

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]


A = TypeVar("A", bound=Artifact)


def read_artifact(path: Path, kind: type[A]) -> A:
    """Read an artifact's JSON file.

    Raises `UserError` if the file is missing, of another format or version, or lacks a value.
    """
    return parse_artifact(read_manifest(path, kind.FORMAT, kind.VERSION), kind, str(path))


def parse_artifact(values: Mapping[str, Any], kind: type[A], where: str) -> A:
    """Build an artifact from the values of its JSON; ``where`` names the source in an error."""
    try:
        made: A = adapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        problems = "; ".join(_problem(each) for each in error.errors())
        raise UserError(
            f"{where} is not a valid {kind.FORMAT} artifact of version {kind.VERSION}: {problems}; "
            "create the artifact again"
        ) from None
    return made


def write_artifact(path: Path, value: Artifact) -> None:
    """Write an artifact as sorted JSON, headed by the name and version of its format."""
    write_manifest(path, value.FORMAT, value.VERSION, plain(value))


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON values under its keys on disk; NaN and infinity become None."""
    body: dict[str, Any] = json.loads(adapter(type(value)).dump_json(value, by_alias=True))
    return body


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a format's file."""
    schema = adapter(kind).json_schema()
    head = {"format": {"const": kind.FORMAT}, "version": {"const": kind.VERSION}}
    required = ["format", "version", *schema.get("required", [])]
    return {**schema, "properties": {**head, **schema["properties"]}, "required": required}


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where} is missing" if error["type"] == "missing" else f"{where}: {error['msg']}"
