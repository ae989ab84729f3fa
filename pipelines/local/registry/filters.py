"""The registry's ``filterQuery``: an SQL-like condition on fields and custom properties."""

import re
from collections.abc import Callable
from typing import Any

import lark

GRAMMAR = r"""
?start: either
?either: both ("OR"i both)*
?both: test ("AND"i test)*
?test: "(" either ")" | PATH OPERATOR value -> compare
    | PATH "LIKE"i STRING -> like | PATH "ILIKE"i STRING -> ilike
    | PATH "IN"i "(" value ("," value)* ")" -> within
value: STRING | NUMBER | BOOLEAN
OPERATOR: "!=" | "<>" | ">=" | "<=" | "=" | ">" | "<"
BOOLEAN.2: /true|false/i
PATH: /`[^`]+`(\.(string|int|double|bool)_value)?|[A-Za-z_][\w.]*/
STRING: /"(\\.|[^"\\])*"|'(\\.|[^'\\])*'/
%import common.SIGNED_NUMBER -> NUMBER
%import common.WS
%ignore WS
"""
PARSER = lark.Lark(GRAMMAR, parser="lalr")
TYPED = re.compile(r"\.(string|int|double|bool)_value$")
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}
Test = Callable[[dict[str, Any]], bool]


class BadFilter(ValueError):
    """A filter that is not of the grammar; its text says where."""


def parse(query: str) -> Test:
    """The condition of a query as a function of an entity; raises `BadFilter`."""
    try:
        return Conditions().transform(PARSER.parse(query))  # type: ignore[no-any-return]
    except lark.exceptions.LarkError as error:
        where = str(error).splitlines()[0]
        raise BadFilter(f"invalid filterQuery {query!r}: {where}") from None


@lark.v_args(inline=True)
class Conditions(lark.Transformer[Any, Any]):
    """Turns each part of a parsed query into a function of an entity."""

    def either(self, *tests: Test) -> Test:
        return lambda entity: any(test(entity) for test in tests)

    def both(self, *tests: Test) -> Test:
        return lambda entity: all(test(entity) for test in tests)

    def value(self, token: lark.Token) -> Any:
        if token.type == "STRING":
            return _unquoted(token)
        return token.lower() == "true" if token.type == "BOOLEAN" else float(token)

    def compare(self, path: str, operator: str, wanted: Any) -> Test:
        def test(entity: dict[str, Any]) -> bool:
            found = _alike(lookup(entity, path), wanted)
            return found is not None and OPERATORS[operator](found, wanted)

        return test

    def like(self, path: str, pattern: str) -> Test:
        return _matches(path, pattern, re.DOTALL)

    def ilike(self, path: str, pattern: str) -> Test:
        return _matches(path, pattern, re.DOTALL | re.IGNORECASE)

    def within(self, path: str, *wanted: Any) -> Test:
        return lambda entity: any(_alike(lookup(entity, path), w) == w for w in wanted)


def lookup(entity: dict[str, Any], path: str) -> Any:
    """A field of an entity, or else a custom property; None where there is neither."""
    name = TYPED.sub("", path).strip("`").removeprefix("customProperties.")
    if name in entity and not isinstance(entity[name], dict):
        return entity[name]
    held = (entity.get("customProperties") or {}).get(name)
    if held is None:
        return None
    return next((value for key, value in held.items() if key != "metadataType"), None)


def _alike(found: Any, wanted: Any) -> Any:
    """What was found as the type of what is wanted, or None if it cannot be compared."""
    if found is None or isinstance(found, bool) != isinstance(wanted, bool):
        return None
    if isinstance(wanted, float):
        try:
            return float(found)  # ids, times and int properties are strings of digits
        except (TypeError, ValueError):
            return None
    return found if isinstance(found, type(wanted)) else None


def _matches(path: str, pattern: str, flags: int) -> Test:
    parts = (".*" if c == "%" else "." if c == "_" else re.escape(c) for c in _unquoted(pattern))
    expression = re.compile("".join(parts), flags)

    def test(entity: dict[str, Any]) -> bool:
        found = lookup(entity, path)
        return isinstance(found, str) and expression.fullmatch(found) is not None

    return test


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])
