"""The settings of the step `deploy`."""

from typing import Annotated, Literal

from nudge.components.common.settings import settings
from pydantic import Field


@settings
class DeploySettings:
    target: Literal["local"] = "local"
    registry_url: str = ""
    """Empty means NUDGE_REGISTRY_URL."""
    smoke_prompt: str = "The Eiffel Tower is located in"
    smoke_tokens: Annotated[int, Field(ge=1, le=256)] = 8
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """The endpoint's port; 0 has a free one chosen."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 180.0
