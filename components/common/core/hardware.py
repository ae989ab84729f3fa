"""The section `plan` of a recipe: the hardware and the speed that `nudge plan` assumes."""

from typing import Annotated

from pydantic import Field

from nudge.components.common.core.settings import settings


@settings
class PlanSettings:
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs that train together, over all nodes; 0 trains on CPUs. Not set: those of `train.cluster`
    for a cluster job, otherwise those of this machine."""
    gpu_memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory of each GPU, in GB of 10^9 bytes. 0: that of this machine's GPUs if training uses
    them, otherwise 80."""
    host_memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory of each node, in GB of 10^9 bytes; 0: `train.cluster.memory` for a cluster job,
    otherwise that of this machine if it trains on CPUs, and no limit with GPUs."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Training tokens per epoch; 0: estimated from the size of the text if that is on this machine,
    at four bytes per token."""
    tokens_per_s: Annotated[float, Field(ge=0)] = 0.0
    """Tokens per second in training, over all ranks. 0: those of this machine's newest run with the
    same model and settings; without such a run, the plan has no hours and no cost."""
