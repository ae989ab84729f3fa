"""The settings of the step `evaluate`."""

from dataclasses import field
from typing import Annotated, Literal

from nudge.components.common.settings import settings
from pydantic import Field


@settings
class Probe:
    """A prompt whose next token is watched: its probability should ``rise``, or ``hold``."""

    prompt: str
    target: str
    expect: Literal["rise", "hold"] = "rise"


@settings
class EvaluateSettings:
    base_model: str
    model_name: str = ""
    """The registered model whose served version is the incumbent; empty: what is served is not
    known, and nothing is promoted."""
    registry_url: str = ""
    """Empty means NUDGE_REGISTRY_URL."""
    window: Annotated[int, Field(ge=8)] = 512
    """Tokens of context that one forward pass sees."""
    stride: Annotated[int, Field(ge=1)] = 256
    """Tokens scored by each pass after the first."""
    max_documents: Annotated[int, Field(ge=1)] = 1000
    """Held-out documents scored, the first of the split's own (hashed) order."""
    probes: list[Probe] = field(default_factory=list)
    """The first one is the running example that training watches and the report shows."""
    hold_limit: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far the probability of a ``hold`` probe may move, relative to where it was."""
    prompts: list[str] = field(default_factory=list)
    """Prompts completed greedily by base and candidate, for people to read."""
    completion_tokens: Annotated[int, Field(ge=1, le=512)] = 24
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Bits per byte by which the candidate must be better, at the interval's worse end."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=100)] = 10_000
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 takes every core that the process may use."""
    seed: int = 1
