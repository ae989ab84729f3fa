"""The error for problems that the user can fix."""

import difflib
from collections.abc import Iterable
from typing import ClassVar

from nudge.components.common.core.sanitize import masked, visible


class UserError(ValueError):
    """Bad input from outside. The text says what was wrong, what is accepted and what to do.

    The command line and the step runner print only this text, without a traceback. It masks
    credentials in URIs and makes control and bidirectional characters visible.
    """

    status: ClassVar[int] = 2
    """The exit status of a process that it ends."""

    def __str__(self) -> str:
        return visible(masked(super().__str__()))


class Transient(UserError):
    """The input is not the cause: an outage, a stopped process, a full disk. A retry may help."""


def one_line(error: BaseException) -> str:
    """What a library's exception says, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(name: str, known: Iterable[str], meant: Iterable[str] = ()) -> str:
    """A hint for an unknown name: ``did you mean 'a' or 'b'?``, or every known name, sorted.

    ``meant`` are the known names that it is another word for; they replace those spelled like it.
    """
    names = sorted(known)
    if not names:
        return "there are none"
    close = [*meant] or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "known: " + ", ".join(names)
