"""The settings of the step `register`."""

from typing import Annotated

from pydantic import Field

from nudge.components.common.clients.registry.names import RegistryName
from nudge.components.common.clients.registry.url import RegistryUrl
from nudge.components.common.core.settings import settings


@settings
class RegisterSettings:
    model_name: RegistryName
    """The name of the registered model."""
    registry_url: RegistryUrl = ""
    """Empty means NUDGE_REGISTRY_URL."""
    registry_name: str = "model-registry"
    """The registry's name on the dashboard, for lineage."""
    author: str = "nudge"
    """The author of the version, as the registry shows it."""
    description: str = ""
    """The description of the version; empty: the name, the version and the verdict."""
    keep_versions: Annotated[int, Field(ge=0)] = 0
    """Archive all but this many of the newest versions; 0 archives none. A version that is served,
    or the one before it that a rollback returns to, is never archived. Setting a version to LIVE in
    the registry restores it."""
    delete_archived: bool = False
    """With keep_versions: also delete the objects of every archived version of the model from the
    object store, except those of a version that is served or that a rollback returns to."""
