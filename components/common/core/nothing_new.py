"""The verdict of a run that found no new text."""

from collections.abc import Mapping
from typing import Any

NOTHING_NEW = "there is no new text: the served version was trained on all of it"


def nothing_new(ingested: Mapping[str, Any]) -> str:
    """Why such a run trains nothing, from the results of ingest.

    If something was dropped, it says what: new text may be in a file that could not be read.
    """
    if not ingested.get("dropped"):
        return NOTHING_NEW
    return f"{NOTHING_NEW} ({ingested.get('account')})"
