"""Names of models on the Hugging Face hub."""

import re

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def hub_hint(uri: str) -> str:
    """What to add to a message about a name such as ``owner/name`` that lacks its scheme."""
    return f", or hf://{uri} for the model on the hub" if HUB_NAME.fullmatch(uri) else ""
