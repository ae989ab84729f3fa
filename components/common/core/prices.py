"""What compute costs, for estimates and reports."""

from typing import Annotated

from pydantic import Field

from nudge.components.common.core.settings import settings


@settings
class Prices:
    """The section `prices` of a recipe; a price of 0 means unknown."""

    gpu_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of one GPU for one hour."""
    node_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of one node without GPUs for one hour."""
    currency: str = "USD"
    """The currency of the prices."""
