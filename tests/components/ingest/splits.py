"""The split that a text alone decides."""

from nudge.components.ingest.cleaning import share_of
from nudge.components.ingest.settings import IngestSettings


def split_of(text: str, settings: IngestSettings) -> str:
    return "validation" if share_of(text, settings) < settings.validation_share else "train"
