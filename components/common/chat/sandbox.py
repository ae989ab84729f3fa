"""Compiles chat templates in the sandbox that transformers uses, with the same names in it.

A template comes with a model and is not trusted: it can read only the plain values that it gets.
"""

import datetime
import functools
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise; its own ``raise_exception`` is a `jinja2.TemplateError`."""


DICT = frozenset(dir(dict))
LOOP = frozenset(("first", "last", "index", "index0", "length"))


class _Generation(jinja2.ext.Extension):
    """Accepts the tag with which some templates mark answers, and ignores it."""

    tags = {"generation"}  # noqa: RUF012  Jinja reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        """The statements inside the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Dict:
    """The type ``dict`` without its attributes."""

    def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
        return dict(*arguments, **values)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template cannot set {name!r}")
        super().__setitem__(name, value)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with a short way to the two kinds of values that templates read all the time: the
    keys of a message and the state of a loop. Checking those took a third of the time."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """The attribute of a value, or its item."""
        if type(obj) is dict and attribute in obj and attribute not in DICT:
            return obj[attribute]
        if type(obj) is jinja2.runtime.LoopContext and attribute in LOOP:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


@functools.lru_cache(maxsize=16)
def compiled(text: str, date: datetime.date) -> Callable[..., str]:
    """A function of a template's values that returns its text; ``strftime_now`` gives ``date``.

    Raises `jinja2.TemplateError` for a template that cannot be compiled. The function raises one of
    `FAULTS`.
    """
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    noon = datetime.datetime.combine(date, datetime.time(12))
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": noon.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    template = environment.from_string(text)
    names = dict(template.globals)

    def render(**values: Any) -> str:
        # `Template.render` copies the global names one by one, which took a quarter of the time.
        context = environment.context_class(
            environment, {**names, **values}, template.name, template.blocks, globals=names
        )
        return "".join(template.root_render_func(context))

    return render


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
