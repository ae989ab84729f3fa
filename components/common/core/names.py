"""Names of models and versions: one pattern wherever they become paths, keys, tags or URLs."""

import re

from nudge.components.common.core.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
"""Also an image tag's pattern (https://github.com/opencontainers/distribution-spec)."""


def check_name(what: str, name: str) -> str:
    """``name`` itself; raises `UserError` unless it can be one part of a path, a key and a URL."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{what} {name!r} is refused: expected a letter or digit, then up to 127 letters, "
            "digits, dots, dashes or underscores"
        )
    return name
