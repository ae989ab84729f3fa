"""The output of a command: in any encoding, and without what acts on a terminal.

A terminal or a pipe that is not UTF-8 must not end a command. Names and logs come from others, so
their control and bidirectional characters are made visible.
"""

import codecs
import io
import json
import sys
import traceback
from types import TracebackType
from typing import Any

import click

from nudge.components.common.core.sanitize import masked, visible

ASCII = {"✓": "+", "✗": "x", "↺": "=", "–": "-", "›": ">", "→": "->", "…": "..."}
ASCII |= dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True))
"""The replacement for a character that the encoding lacks; ``?`` replaces all others."""


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Write a message to stdout, or with ``err`` to stderr."""
    click.echo(visible(text), err=err, nl=nl)


def echo_json(values: Any) -> None:
    """Write values as JSON; characters that would act on a terminal are escaped."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    click.echo("".join(each if visible(each) == each else json.dumps(each)[1:-1] for each in text))


def _show_traceback(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    sys.stderr.write(visible(masked("".join(traceback.format_exception(kind, error, where)))))


def write_anything() -> None:
    """Let this process write every text to its output, whatever the encoding of that is, and every
    unexpected error without what acts on a terminal."""
    sys.excepthook = _show_traceback

    def known(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lost = error.object[error.start : error.end]
        return "".join(ASCII.get(each, "?") for each in lost), error.end

    codecs.register_error("nudge", known)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nudge")
