"""The terminal, to which no control or bidirectional character of a name or a log gets through."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from nudge.components.common.core.sanitize import visible


class Screen(Console):
    """A rich console that shows such characters instead of sending them.

    What rich itself sends (colors, the cursor's movements) is unchanged.
    """

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        """The segments of something to print."""
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
