"""Values of custom properties: what the registry and its client support, and how to store the rest.

The registry's largest integer is 2147483647, its client's has nine digits, and neither supports NaN
or infinity. Such a number is stored as a string property, in decimal digits or as ``nan``, ``inf``
or ``-inf``, and the string property `NUMBERS_AS_TEXT` lists the names of these properties as JSON.
`read_properties` turns them back into numbers; any other reader sees the digits.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from nudge.components.common.core.errors import UserError

Value = str | int | float | bool

NUMBERS_AS_TEXT = "numbers_as_text"
LARGEST_INTEGER = 999_999_999
"""Nine digits: the most that client 0.3.14 accepts, in requests and in answers."""
LONGEST_KEY = 255
"""Characters of a property's name; the server answers 500 to a longer one."""
LONGEST_URI = 65_535
"""Bytes of a URI; the server answers 500 to a longer one."""
LONGEST_VALUE = 16_777_215
"""Bytes of a string property (MariaDB's MEDIUMTEXT); the server answers 500 to a longer one."""
TYPES = {
    "MetadataStringValue": ("string_value", str),
    "MetadataIntValue": ("int_value", str),
    "MetadataDoubleValue": ("double_value", int | float),
    "MetadataBoolValue": ("bool_value", bool),
    "MetadataStructValue": ("struct_value", str),
    "MetadataProtoValue": ("proto_value", str),
}

UNSUPPORTED = ("MetadataStructValue", "MetadataProtoValue")
"""What the registry's client does not read."""


def storable(properties: Mapping[str, Value]) -> dict[str, Value]:
    """Properties as the registry can store them; `read_properties` is the inverse."""
    stored, as_text = dict(properties), []
    for name, value in properties.items():
        if not isinstance(value, bool) and isinstance(value, int | float) and not _fits(value):
            stored[name] = str(value)
            as_text.append(name)
    if as_text:
        stored[NUMBERS_AS_TEXT] = json.dumps(sorted(as_text))
    return stored


def read_properties(stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """The original properties, from the registry's copy that `storable` made."""
    properties = dict(stored or {})
    for name in _listed(properties.pop(NUMBERS_AS_TEXT, "[]")):
        text = properties.get(name)
        if isinstance(text, str):
            properties[name] = int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    return properties


def properties_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """The original properties of an entity in the registry's JSON; unreadable ones are left out."""
    stored = _readable_properties(item.get("customProperties") or {})
    values = {
        name: each[TYPES[each["metadataType"]][0]]
        for name, each in stored.items()
        if each["metadataType"] not in UNSUPPORTED
    }
    integers = {n for n, each in stored.items() if each["metadataType"] == "MetadataIntValue"}
    return read_properties(
        {name: int(value) if name in integers else value for name, value in values.items()}
    )


def check_sendable(body: Any, where: str = "") -> None:
    """Raise `UserError` naming the field if the server cannot store a request's body.

    NaN, infinity and NUL would be refused or break the registry's own lists. A name, key, URI or
    value that is too long causes a 500, which looks like an outage.
    """
    if isinstance(body, Mapping):
        for key, value in body.items():
            if where.endswith("customProperties"):
                _check_length(f"the name of the property {key[:40]!r}", len(key), LONGEST_KEY)
            _check_text(key, f"a key of {where or 'the body'}")
            check_sendable(value, f"{where}.{key}".lstrip("."))
    elif isinstance(body, list):
        for item in body:
            check_sendable(item, where)
    elif isinstance(body, float) and not math.isfinite(body):
        raise UserError(f"{where} is {body}; the registry stores only finite numbers")
    elif isinstance(body, str):
        _check_text(body, where)
        field = where.rpartition(".")[2]
        if field in ("name", "externalId"):
            _check_length(where, len(body), 255)
        limit = LONGEST_URI if field == "uri" else LONGEST_VALUE
        _check_length(where, len(body.encode()), limit, "bytes")


def readable(answer: Any) -> Any:
    """A copy of the registry's answer with properties that its client can read.

    Other programs, and older embedded registries, wrote integers of ten digits and non-finite
    numbers; one of them must not make a complete list unreadable.
    """
    if isinstance(answer, list):
        return [readable(each) for each in answer]
    if not isinstance(answer, dict):
        return answer
    copied = {key: readable(value) for key, value in answer.items()}
    if isinstance(properties := copied.get("customProperties"), dict):
        copied["customProperties"] = _readable_properties(properties)
    return copied


def _readable_properties(properties: dict[str, Any]) -> dict[str, Any]:
    kept, as_text = {}, []
    for name, value in properties.items():
        metadata_type = value.get("metadataType") if isinstance(value, dict) else None
        field, kind = TYPES.get(str(metadata_type), ("", str))
        content: Any = value.get(field) if field else None
        if not isinstance(content, kind):
            continue
        if isinstance(content, float) and not math.isfinite(content):
            continue
        if field == "int_value" and not re.fullmatch(r"-?([1-9]\d{0,8}|0)", str(content)):
            if not re.fullmatch(r"-?\d+", str(content)):
                continue
            as_text.append(name)
            value = _text(str(content))
        kept[name] = value
    if as_text:
        listed = kept.get(NUMBERS_AS_TEXT, {}).get("string_value", "[]")
        kept[NUMBERS_AS_TEXT] = _text(json.dumps(sorted({*_listed(listed), *as_text})))
    return kept


def _fits(value: int | float) -> bool:
    return abs(value) <= LARGEST_INTEGER if isinstance(value, int) else math.isfinite(value)


def _listed(text: Any) -> list[str]:
    try:
        names = json.loads(text)
    except (TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _text(value: str) -> dict[str, str]:
    return {"metadataType": "MetadataStringValue", "string_value": value}


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise UserError(f"{where} contains a NUL character, which the registry refuses; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} contains half a surrogate pair; use valid Unicode") from None


def _check_length(where: str, length: int, limit: int, unit: str = "characters") -> None:
    if length > limit:
        raise UserError(f"{where} has {length} {unit}; the registry stores up to {limit}")
