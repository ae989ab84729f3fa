"""Make text safe to show: mask credentials, and disarm what acts on a terminal or a page."""

import re
import unicodedata
from typing import Any

CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
"""The Content-Security-Policy of every report: the page loads, runs and sends nothing."""
MASK = "***"
_USER = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@?#'\"]+@")
_QUERY = re.compile(r"(\bhttps?://[^\s?#'\"<>]*\?)[^\s'\"<>]+", re.IGNORECASE)

_URI = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>]+")
_SECRET_QUERY = re.compile(
    r"[?&][^=&#]*(sig|signature|token|secret|password|passwd|credential|key|auth)[^=&#]*=[^&#]",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """``text`` with the user and password of each URI, and the query of each web address, masked.

    The query of a presigned address is a credential, whatever the names in it are.
    """
    return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", text))


def credentials(text: str) -> list[str]:
    """The URIs in ``text`` with a user and password, or a query that holds a secret, masked.

    A query counts if one of its names is that of a signature, key or token, as in a presigned
    address; others, such as ``?raw=true``, do not.
    """
    found = [match[0] for match in _URI.finditer(text) if _USER.search(match[0])]
    found += [match[0] for match in _URI.finditer(text) if _SECRET_QUERY.search(match[0])]
    return list(dict.fromkeys(masked(uri) for uri in found))


def visible(value: Any) -> str:
    """``value`` with its control and invisible characters made visible.

    Control characters become their pictures. Invisible ones, such as right-to-left marks or lone
    surrogates, become their code points. Newlines and tabs stay.
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
