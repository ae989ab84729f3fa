"""What a reader yields instead of a text that it cannot read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unreadable:
    """A record that exists but cannot be read; counted under ``reason`` and left out."""

    reason: str
    detail: str = ""
    bytes: int = 0
    """The size of the missing text, if known."""
