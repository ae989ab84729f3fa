"""The settings of the step `summary`."""

from nudge.components.common.settings import settings


@settings
class SummarySettings:
    """What the recipe's section `register` says of where a version is to be found."""

    model_name: str
    registry_url: str = ""
    """Empty means NUDGE_REGISTRY_URL."""
