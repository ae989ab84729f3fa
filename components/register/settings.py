"""The settings of the step `register`."""

from typing import Annotated

from pydantic import Field

from nudge.components.common.clients.registry.connection import RegistryUrl
from nudge.components.common.clients.registry.names import RegistryName
from nudge.components.common.core.settings import settings


@settings
class RegisterSettings:
    model_name: RegistryName
    registry_url: RegistryUrl = ""
    """Empty means NUDGE_REGISTRY_URL."""
    registry_name: str = "model-registry"
    """The registry's name on the dashboard, for lineage."""
    author: str = "nudge"
    description: str = ""
    keep_versions: Annotated[int, Field(ge=0)] = 0
    """Archive older versions than the newest so many; 0 archives none. Never one that is served or
    that a rollback returns to, the one before it; LIVE in the registry undoes it."""
    delete_archived: bool = False
    """With keep_versions: also delete the objects of every archived version of the model from the
    object store. Never of one that is served or that a rollback returns to."""
