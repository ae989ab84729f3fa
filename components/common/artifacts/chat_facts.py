"""What the tokens and the model artifact record about conversations."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChatFacts:
    """How conversations became text."""

    template: str
    """The Jinja text."""
    source: str
    """``model`` (the base's own), ``recipe``, or ``chatml`` for a base without one."""
    learn: str
    """``assistant``, ``last`` or ``all``."""
    end_of_turn: str
    """The token that ends an answer."""
    end_of_turn_id: int
