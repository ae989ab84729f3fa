"""The error of a registry that does not answer."""

from nudge.components.common.core.errors import Transient


class Unreachable(Transient):
    """The registry cannot be used now; the same request may succeed later.

    ``permanent`` if only another URL can help.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
