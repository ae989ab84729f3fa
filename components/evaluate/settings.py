"""The settings of the step `evaluate`."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from nudge.components.common.clients.registry.connection import RegistryUrl
from nudge.components.common.clients.registry.names import OptionalRegistryName
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.common.core.settings import settings


@settings
class Probe:
    """A prompt, and a target after it whose probability should ``rise``, or ``hold``.

    A target of several tokens counts whole: its probability is the product over its tokens. What
    should rise is held against the base model; what should hold, as all that stops a promotion,
    against the version served now, if there is one.
    """

    prompt: Annotated[str, Field(min_length=1)]
    target: Annotated[str, Field(min_length=1)]
    expect: Literal["rise", "hold"] = "rise"


@settings
class Guard:
    """Text of another kind (general English, code, ...) on which the candidate may not get worse.

    Promotion needs the worse end of the interval of the difference to lie within ``limit``: that
    nothing is lost must be shown, as a gain must. A set of fewer documents than can show it is
    refused, before anything is scored.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")]
    uri: str
    """package://, file:// or a path, the last two with patterns (*), or an s3:// folder. Of .jsonl
    (and .jsonl.gz) each line's ``text`` is a document, any other file is one."""
    limit: Annotated[float, Field(ge=0)] = 0.05
    """Bits per byte by which the candidate may be worse than what it is held against."""
    max_documents: Annotated[int, Field(ge=MIN_DOCUMENTS)] = 200


@settings
class Task:
    """A task of lm-evaluation-harness; its first metric is held against that of the reference."""

    name: str
    limit: Annotated[float, Field(ge=0)] | None = None
    """How far the metric may get worse; none: it is told, and stops nothing."""
    examples: Annotated[int, Field(ge=0)] = 0
    """Examples asked, the first ones; 0 means all."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Worked examples in the prompt; none: as the task says."""


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


@settings
class EvaluateSettings:
    base_model: str
    model_name: OptionalRegistryName = ""
    """The registered model whose served version is the incumbent; empty: what is served is not
    known, and nothing is promoted."""
    registry_url: RegistryUrl = ""
    """Empty means NUDGE_REGISTRY_URL."""
    window: Annotated[int, Field(ge=8)] = 512
    """Tokens of context that one forward pass sees."""
    stride: Annotated[int, Field(ge=1)] = 256
    """Tokens scored by each pass after the first."""
    first_token: Literal["auto", "bos", "end", "none"] = "auto"
    """What stands before a document's first token: the tokenizer's BOS, an end-of-document token,
    or nothing, and then the first token itself is not scored. ``auto`` takes BOS if the tokenizer
    puts it before a text by itself (Gemma, Llama 3), else the end of the document before, as
    training does."""
    max_documents: Annotated[int, Field(ge=MIN_DOCUMENTS)] = 1000
    """Held-out documents scored, the first of the split's own (hashed) order. Of fewer than 16 no
    interval is worked out, and nothing is promoted (`FEWEST_DOCUMENTS`)."""
    guards: list[Guard] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    """The first one is the running example that training watches and the report shows."""
    hold_limit: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far the probability of a ``hold`` probe may move, relative to where it was before."""
    prompts: list[str] = field(default_factory=list)
    """Prompts completed greedily by base and candidate; the candidate's must be sane."""
    completion_tokens: Annotated[int, Field(ge=1, le=512)] = 24
    tasks: list[Annotated[Task, BeforeValidator(_named)]] = field(default_factory=list)
    """Names of lm-evaluation-harness's tasks (the extra ``tasks``), or `Task` mappings."""
    task_folder: str = ""
    """A folder of task files of one's own, besides those that the harness brings."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Bits per byte by which the candidate must be better, at the interval's worse end."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=100)] = 10_000
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; bfloat16 halves memory, and its scores are good to about 3 digits."""
    batch_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of one forward pass; 0: 2,048 on a CPU, 16,384 on a GPU."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 takes every core that the process may use."""
    seed: int = 1

    @model_validator(mode="after")
    def _names_differ(self) -> "EvaluateSettings":
        names = [guard.name for guard in self.guards]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two guards are named {', '.join(sorted(doubled))}; rename one")
        return self
