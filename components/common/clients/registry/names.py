"""Names in the Model Registry: one rule for all of them, and which ones its database confuses.

The server looks names up with SQL LIKE: ``_`` matches any character, ``%`` any text, and a
backslash escapes. MariaDB also ignores case, accents and trailing blanks, in lookups and in its
unique keys. So the server may return another name than the requested one.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.names import check_name

LONGEST_NAME = 244
"""Characters. The server allows 255 for the parent's id, a colon and the name; an id is an int32 of
up to 10 digits. This applies to models too: their artifacts and services have the model's name and
a parent."""


def check_lookup(name: str) -> str:
    """A name to look up, unchanged; raises `UserError` if the registry cannot store it.

    Names of older versions and of other people may be any text; `check_name` is the stricter rule
    for names that nudge itself creates and serves.
    """
    if not name:
        raise UserError("the name is empty; it needs at least one character")
    if len(name) > LONGEST_NAME:
        raise UserError(
            f"the name {name[:40]!r}... has {len(name)} characters; the registry stores up to "
            f"{LONGEST_NAME} (255 with the parent's id and a colon)"
        )
    if name != name.strip():
        raise UserError(f"the name {name!r} begins or ends with a blank; remove it")
    for character in name:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise UserError(
                f"the name {name!r} contains the control character {character!r}; remove it"
            )
    return name


RegistryName = Annotated[str, AfterValidator(lambda name: check_name("the name", name))]
"""The name of a model or a version in settings."""
OptionalRegistryName = Annotated[
    str, AfterValidator(lambda name: name and check_name("the name", name))
]
"""The same, or an empty string for no name."""
PublishedName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,48}[a-z0-9])?$")]
"""The name of a model that nudge uploads: part of URLs and resource names."""


def confused_with(name: str, existing: Iterable[str]) -> str | None:
    """The first other existing name that the server could confuse with ``name``, or None.

    That is a name which a lookup of ``name`` could return, or whose lookup could return ``name``.
    """
    folded = fold(name)
    for other in existing:
        if other == name:
            continue
        other_folded = fold(other)
        if (
            folded.rstrip() == other_folded.rstrip()
            or like(folded, other_folded)
            or like(other_folded, folded)
        ):
            return other
    return None


def refuse_confusable(kind: str, name: str, existing: Iterable[str]) -> None:
    """Raise `UserError` if the server would confuse a new name of a ``kind`` with an existing one.

    ``kind`` is a noun, such as ``model``.
    """
    if other := confused_with(name, existing):
        raise UserError(
            f"the registry would confuse the new {kind} {name!r} with the existing {kind} "
            f"{other!r} (it looks names up with SQL LIKE, where _ and % match any text, and some "
            "databases ignore case and accents); choose a name that differs in other characters"
        )


def fold(name: str) -> str:
    """A name as MariaDB's collations compare it: without case and accents."""
    letters = unicodedata.normalize("NFKD", name)
    return "".join(each for each in letters if unicodedata.category(each) != "Mn").casefold()


def like(pattern: str, text: str) -> bool:
    """Whether SQL's ``text LIKE pattern`` is true, with the backslash as escape character."""
    parts, escaped = [], False
    for character in pattern:
        if not escaped and character == "\\":
            escaped = True
            continue
        wild = {"_": ".", "%": ".*"}.get(character) if not escaped else None
        parts.append(wild or re.escape(character))
        escaped = False
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None
