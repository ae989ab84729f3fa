"""The settings of the step `register`."""

from nudge.components.common.settings import settings


@settings
class RegisterSettings:
    model_name: str
    registry_url: str = ""
    """Empty means NUDGE_REGISTRY_URL."""
    registry_name: str = "model-registry"
    """The registry's name on the dashboard, for lineage."""
    author: str = "nudge"
    description: str = ""
