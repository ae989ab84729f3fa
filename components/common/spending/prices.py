"""What compute costs, and how much of it a run may use: the sections `prices` and `budget`."""

from typing import Annotated

from pydantic import Field

from nudge.components.common.core.settings import settings

Amount = Annotated[float, Field(ge=0)]
Limit = Annotated[float, Field(gt=0)] | None


@settings
class Prices:
    """The section `prices` of a recipe. A cost is the sum of what has a price; set only what you
    pay for, so that nothing counts twice."""

    gpu_hour: Amount = 0.0
    """Price of one GPU for one hour; 0: not charged, or unknown."""
    core_hour: Amount = 0.0
    """Price of one hour of CPU time on one core; 0: not charged, or unknown."""
    node_hour: Amount = 0.0
    """Price of one node for one hour; 0: not charged, or unknown."""
    kwh: Amount = 0.0
    """Price of one kilowatt-hour that the devices report; 0: not charged, or unknown."""
    currency: Annotated[str, Field(pattern=r"^[A-Za-z]{3}$|^[€$£¥]$")] = "USD"
    """The currency of the prices."""

    @property
    def known(self) -> bool:
        """Whether anything has a price."""
        return bool(self.gpu_hour or self.core_hour or self.node_hour or self.kwh)

    def cost(
        self,
        *,
        gpu_hours: float = 0.0,
        core_hours: float = 0.0,
        node_hours: float = 0.0,
        kwh: float = 0.0,
    ) -> float | None:
        """The cost in `currency`; None if nothing has a price."""
        if not self.known:
            return None
        return (
            gpu_hours * self.gpu_hour
            + core_hours * self.core_hour
            + node_hours * self.node_hour
            + kwh * self.kwh
        )


@settings
class Budget:
    """The section `budget` of a recipe: the most that one run may use. A run that needs more is
    refused before it starts, or stopped at a checkpoint from which a larger budget continues."""

    cost: Limit = None
    """In the currency of `prices`, which must have a price then. Unset: no limit."""
    gpu_hours: Limit = None
    """Hours of GPUs. Unset: no limit."""
    core_hours: Limit = None
    """Hours of CPU time over all cores. Unset: no limit."""
    hours: Limit = None
    """Hours from the start of the first step to the end of training. Unset: no limit."""
