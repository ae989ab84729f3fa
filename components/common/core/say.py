"""The one way in which nudge's steps write to a log, so that no message can act on a terminal."""

import sys

from nudge.components.common.core.sanitize import masked, visible


def say(text: object, *, stdout: bool = False) -> None:
    """Write a message and a newline to stderr, or to stdout.

    Names, paths and other programs' errors in it may have control and bidirectional characters,
    which are made visible, and URIs with credentials, which are masked.
    """
    print(visible(masked(str(text))), file=sys.stdout if stdout else sys.stderr, flush=True)
