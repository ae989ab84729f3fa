"""The error that a person caused and a person can mend."""

import difflib
from collections.abc import Iterable

from nudge.components.common.core.sanitize import masked, visible


class UserError(ValueError):
    """Something given from outside is wrong: says what was given, what is accepted, what to do.

    The command line and the step runner print its text alone, without a traceback. Credentials in
    URIs are masked in the text, and control and bidirectional characters are made visible.
    """

    def __str__(self) -> str:
        return visible(masked(super().__str__()))


class Transient(UserError):
    """The input is not to blame: an outage, a stopped process, a full disk. A retry may succeed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ``did you mean 'a' or 'b'?``, or every known name, sorted."""
    names = sorted(known)
    if not names:
        return "there are none"
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "known: " + ", ".join(names)
