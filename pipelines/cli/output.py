"""Output in any encoding: a terminal or a pipe that is not UTF-8 must not end a command."""

import codecs
import io
import sys

ASCII = {"✓": "+", "✗": "x", "↺": "=", "–": "-", "›": ">", "→": "->", "…": "..."}
ASCII |= dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True))
"""The replacement for a character that the encoding lacks; ``?`` replaces all others."""


def write_anything() -> None:
    """Let this process write every text to its output, whatever the encoding of that is."""

    def known(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        lost = error.object[error.start : error.end]
        return "".join(ASCII.get(each, "?") for each in lost), error.end

    codecs.register_error("nudge", known)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nudge")
