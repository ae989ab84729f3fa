"""What of a text may be shown: no credentials, and nothing that acts on a terminal or a page."""

import re
import unicodedata
from typing import Any

CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
"""The Content-Security-Policy of every page that a step leaves: nothing is loaded, run or sent."""
MASK = "***"
_USER = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@?#'\"]+@")
_QUERY = re.compile(r"(\bhttps?://[^\s?#'\"<>]*\?)[^\s'\"<>]+", re.IGNORECASE)


def masked(text: str) -> str:
    """``text`` with the user and password of each URI, and the query of each web address, masked.

    A presigned address is a credential by its query, whatever the names in it are.
    """
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text))


def visible(value: Any) -> str:
    """``value`` with what the eye or a page's text order would miss made visible.

    Control characters become their pictures, and invisible ones such as right-to-left marks or
    lone surrogates their code points; newlines and tabs stay.
    """
    shown = []
    for char in str(value):
        kind, code = unicodedata.category(char), ord(char)
        if kind == "Cc" and char not in "\n\t":
            shown.append(chr(0x2400 + code) if code < 32 else "␡" if code == 127 else f"[{code:X}]")
        elif kind in ("Cf", "Cs", "Zl", "Zp"):
            shown.append(f"[U+{code:04X}]")
        else:
            shown.append(char)
    return "".join(shown)
