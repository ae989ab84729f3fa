"""The settings of the step `evaluate`."""

import re
from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from nudge.components.common.clients.registry.names import OptionalRegistryName
from nudge.components.common.clients.registry.url import RegistryUrl
from nudge.components.common.core import default_guard
from nudge.components.common.core.recipe import some_settings, step_settings
from nudge.components.common.core.sample_size import MIN_DOCUMENTS
from nudge.components.common.core.settings import settings
from nudge.components.common.spending.prices import Prices


@settings
class Probe:
    """A prompt, and a target after it whose probability should ``rise`` or ``hold``.

    The probability of a target of several tokens is the product over its tokens. A probe that
    should rise is compared with the base model. A probe that should hold, like every check that can
    stop a promotion, is compared with the version served now, if there is one.
    """

    prompt: Annotated[str, Field(min_length=1)]
    """The text that the model continues."""
    target: Annotated[str, Field(min_length=1)]
    """The continuation whose probability counts, with its leading space."""
    expect: Literal["rise", "hold"] = "rise"
    """Whether the probability should rise, or must hold."""


@settings
class Guard:
    """Text of another kind (general English, code, ...) on which the candidate must not get worse.

    The worse end of the difference's interval must be within ``limit``: like a gain, the absence of
    a loss must be proven. A set with too few documents for that is rejected before scoring.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")]
    """The name of the set in the report."""
    uri: str
    """package://, file:// or a path, the last two with patterns (*), or an s3:// folder. In .jsonl
    (and .jsonl.gz) each line's ``text`` is a document; any other file is one document."""
    limit: Annotated[float, Field(ge=0)] = 0.05
    """Bits per byte by which the candidate may be worse than the model it is compared with."""
    max_documents: Annotated[int, Field(ge=MIN_DOCUMENTS)] = 200
    """The largest number of documents to score."""


DEFAULT_GUARD = Guard(name=default_guard.NAME, uri=default_guard.URI, limit=0.2)
"""The guard of a recipe that names none. Its limit is wide, because nobody chose it."""


@settings
class Task:
    """A task of lm-evaluation-harness; its first metric is compared with that of the reference."""

    name: str
    """The task's name in lm-evaluation-harness."""
    limit: Annotated[float, Field(ge=0)] | None = None
    """How far the metric may get worse; if unset, it is only reported."""
    examples: Annotated[int, Field(ge=0)] = 0
    """Number of examples to use, from the first; 0 means all."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Worked examples in the prompt; if unset, the task decides."""


@settings
class ExpectedAnswer:
    """A question to a chat model (or a text to continue) and the answer that it must give."""

    prompt: Annotated[str, Field(min_length=1)]
    """The user turn."""
    answer: Annotated[str, Field(min_length=1)]
    """The expected answer, a part of it, or a regular expression, as `match` says."""
    match: Literal["contains", "exact", "regex"] = "contains"
    """How the answer is compared, without regard to case. `exact` ignores space around it; `regex`
    searches, as Python's `re` does."""

    @model_validator(mode="after")
    def _compiles(self) -> "ExpectedAnswer":
        if self.match == "regex":
            try:
                re.compile(self.answer)
            except re.error as error:
                raise ValueError(
                    f"answer {self.answer!r} is not a regular expression: {error}"
                ) from None
        return self


@settings
class JudgeSettings:
    """A model that compares the answers of the candidate with those of the reference. Any endpoint
    of the OpenAI API works; NUDGE_JUDGE_KEY has its key."""

    url: Annotated[str, Field(pattern=r"^https?://.+")]
    """The endpoint's base URL, which ends with /v1."""
    model: Annotated[str, Field(min_length=1)]
    """The judge's name at that endpoint."""
    min_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least share of answers in which the judge must prefer the candidate; a tie counts half.
    Unset: the result is only reported."""
    max_tokens: Annotated[int, Field(ge=1)] = 8
    """Tokens of the judge's reply; raise it for a model that reasons first."""


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


@settings
class EvaluateSettings:
    base_model: str
    """The model that training started from, scored beside the candidate."""
    model_name: OptionalRegistryName = ""
    """The registered model whose served version is the incumbent. If empty, it is unknown what is
    served, and nothing is promoted."""
    registry_url: RegistryUrl = ""
    """Empty means NUDGE_REGISTRY_URL."""
    unverified: list[Literal["hf", "pvc"]] = field(default_factory=list)
    """Compare with a served version at ``hf://`` or ``pvc://``, whose files cannot be checked
    against the registry. Empty in a recipe means its deploy.unverified."""
    window: Annotated[int, Field(ge=8)] = 512
    """Tokens of context in one forward pass."""
    stride: Annotated[int, Field(ge=1)] = 256
    """Tokens scored by each pass after the first."""
    first_token: Literal["auto", "bos", "end", "none"] = "auto"
    """The token before a document's first token: the tokenizer's BOS, an end-of-document token, or
    nothing, in which case the first token is not scored. ``auto`` uses BOS if the tokenizer adds it
    to a text by itself (Gemma, Llama 3), else the end-of-document token, as training does."""
    max_documents: Annotated[int, Field(ge=MIN_DOCUMENTS)] = 1000
    """Held-out documents to score, the first in the split's (hashed) order. With fewer than 16
    there is no interval, and nothing is promoted (`MIN_DOCUMENTS`)."""
    guards: list[Guard] | None = None
    """Sets of other text on which the candidate may lose little. Unset: `DEFAULT_GUARD`, a few
    pages of plain English with a limit that only serious forgetting exceeds, unless the model is
    trained from scratch. An empty list: none."""
    probes: list[Probe] = field(default_factory=list)
    """The first one is the running example, which training watches and the report shows."""
    hold_limit: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far the probability of a ``hold`` probe may move, as a fraction of its earlier value."""
    prompts: list[str] | None = None
    """Prompts that base and candidate complete greedily; the candidate's answers must not be empty
    or repeat themselves. Unset: the beginnings of three held-out documents. An empty list: none."""
    completion_tokens: Annotated[int, Field(ge=1, le=512)] = 24
    """Tokens per completion of `prompts`."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether prompts and probes are user turns, rendered with the chat template; `auto`: if the
    model was trained on conversations."""
    system: str = ""
    """The system turn before every prompt and probe of a chat model."""
    answers: list[ExpectedAnswer] = field(default_factory=list)
    """Questions that the candidate must answer as expected; a wrong answer stops the promotion."""
    answer_tokens: Annotated[int, Field(ge=1, le=4096)] = 96
    """The most tokens of a chat model's answer."""
    judge: JudgeSettings | None = None
    """A model that compares the answers to `prompts`, in both orders."""
    ends_turn_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The smallest share of a chat model's answers that must end with its end-of-turn token within
    `answer_tokens`. A model that learned no end of turn never stops."""
    tasks: list[Annotated[Task, BeforeValidator(_named)]] = field(default_factory=list)
    """Names of lm-evaluation-harness tasks (the extra ``tasks``), or `Task` mappings."""
    task_folder: str = ""
    """A folder of your own task files, in addition to those of the harness."""
    control_tokens_in_texts: Literal["text", "token"] = "text"
    """What a control token is that a document spells out; a recipe's section `tokenize` says it."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Bits per byte by which the worse end of the interval must be better."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """The confidence level of the bootstrap interval."""
    resamples: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap resamples of the documents."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the weights. bfloat16 halves memory; its scores are accurate to about 3 digits."""
    batch_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens per forward pass; 0 means 2,048 on a CPU and 16,384 on a GPU."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 means every core that the process may use."""
    seed: int = 1
    """Seeds the bootstrap."""

    @model_validator(mode="after")
    def _names_differ(self) -> "EvaluateSettings":
        names = [guard.name for guard in self.guards or ()]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two guards are named {', '.join(sorted(doubled))}; rename one")
        return self


@settings
class Unverified:
    """The schemes that a recipe's section `deploy` trusts."""

    unverified: list[Literal["hf", "pvc"]] = field(default_factory=list)


@settings
class Tokenized:
    """What a recipe's section `tokenize` says about documents."""

    control_tokens_in_texts: Literal["text", "token"] = "text"


def evaluate_settings(recipe: str, **overrides: Any) -> EvaluateSettings:
    """The settings in a recipe's text; `overrides` and errors are those of `step_settings`."""
    chosen = step_settings(EvaluateSettings, "evaluate", recipe, **overrides)
    tokenized = some_settings(Tokenized, "tokenize", recipe)
    if tokenized.control_tokens_in_texts == "token":
        chosen = replace(chosen, control_tokens_in_texts="token")
    if chosen.unverified:
        return chosen
    return replace(chosen, unverified=some_settings(Unverified, "deploy", recipe).unverified)


def prices_of(recipe: str) -> Prices:
    """The prices in a recipe's text, for the cost in the report."""
    return step_settings(Prices, "prices", recipe)
