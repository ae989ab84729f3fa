"""The settings of the step `summary`."""

from nudge.components.common.clients.registry.connection import RegistryUrl
from nudge.components.common.clients.registry.names import RegistryName
from nudge.components.common.core.settings import settings


@settings
class SummarySettings:
    """The settings in the recipe's section `register` that locate a version."""

    model_name: RegistryName
    registry_url: RegistryUrl = ""
    """Empty means NUDGE_REGISTRY_URL."""
