"""The evaluation artifact: one JSON file (nudge.evaluation, version 1) with verdict and evidence.

The models are called ``base``, ``incumbent`` (the version served now; absent if there is none) and
``candidate``. Losses are in nats, differences in bits per byte, candidate minus the other model, so
a negative difference is an improvement.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from nudge.components.common.artifacts.corpus import Source
from nudge.components.common.artifacts.cost import Cost
from nudge.components.common.artifacts.model import BaseModel, Training
from nudge.components.common.artifacts.schema import Omitted, read_artifact, write_artifact

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"type": ["number", "null"]}),
]
"""A float that is NaN where the JSON has null."""


@dataclass(frozen=True)
class Incumbent:
    """The version that users get now: found, none, or unknown because something did not answer."""

    state: Literal["found", "none", "unknown"]
    version: str = ""
    uri: str = ""
    sha256: str = ""
    """Of its weights, as recorded in the registry by the run that made it; empty if unrecorded."""
    manifest_sha256: str = ""
    """Of its upload's manifest, as recorded in the registry; older releases recorded none."""
    why: str = ""
    """If ``unknown``: what could not be read."""
    shares: dict[str, int] = field(default_factory=dict)
    """Percent of the traffic by version at the time of the evaluation."""


@dataclass(frozen=True)
class Check:
    """One requirement besides the gain; a check that is not ``ok`` stops the promotion."""

    kind: Literal[
        "loss", "probe", "guard", "completion", "answer", "turn", "judge", "task", "package"
    ]
    name: str
    ok: bool
    message: Annotated[str, Field(alias="told")]
    """What was measured, as a clause."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The candidate's difference from one model, in bits per byte."""

    difference_bits_per_byte: float | None = None
    interval: tuple[Number, Number] | None = None
    """None if too few documents were scored for an interval."""


@dataclass(frozen=True, kw_only=True)
class Verdict(Comparison):
    """Whether to promote, why, and the difference from the model that decided (``reference``)."""

    promote: bool = False
    reason: str = ""
    reference: str = "base"
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """By name of the other model."""
    confidence: float | None = None
    margin: float = 0.0
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One model on one set of texts. A perplexity is None where no float holds it."""

    nats_per_token: float | None = None
    token_perplexity: float | None = None
    bits_per_byte: float | None = None
    word_perplexity: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    words: int | None = None
    documents: int | None = None


@dataclass(frozen=True, kw_only=True)
class GuardResult(Comparison):
    """One guard set; ``limit`` is the loss allowed, in bits per byte."""

    name: str
    uri: str = ""
    limit: float | None = None
    metrics: dict[str, Metrics] = field(default_factory=dict)
    ok: bool = False


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A task's metric for one model, and its standard error if that is known."""

    value: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task of lm-evaluation-harness; without a ``limit`` it cannot stop a promotion."""

    name: str
    limit: float | None = None
    metric: str = ""
    higher_is_better: bool = True
    examples: int | None = None
    reference: float | None = None
    candidate: float | None = None
    models: dict[str, TaskScore] = field(default_factory=dict)
    ok: bool = False


@dataclass(frozen=True, kw_only=True)
class Token:
    id: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A likely next token and its probability."""

    token: str
    p: float | None = None
    id: Omitted[int] = None


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One probe: P(target) after the prompt, before (``reference``) and after (candidate)."""

    prompt: str
    messages: Omitted[tuple[dict[str, str], ...]] = None
    """The turns in which a chat model was asked; None for a text to continue."""
    prompt_tokens: tuple[Token, ...] = ()
    target: str = ""
    target_tokens: tuple[Token, ...] = ()
    expect: Literal["rise", "hold"] = "rise"
    reference: str = "base"
    limit: float | None = None
    p_before: float | None = None
    p_after: float | None = None
    ok: bool = False
    rivals_before: tuple[Rival, ...] = ()
    rivals_after: tuple[Rival, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """One of the models that were compared."""

    uri: str = ""
    sha256: str = ""
    """Of its weights."""
    first_token: str | None = ""
    """The token before a document's first one; None for nothing, empty if unrecorded."""
    files_sha256: Omitted[str] = None
    """Of every file of the candidate, so that only an upload of exactly these is registered."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the texts were scored, on what, and the seed of the bootstrap."""

    window: int | None = None
    stride: int | None = None
    first_token: str | None = None
    resamples: int | None = None
    seed: int | None = None
    texts_sha256: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    precision: str | None = None
    torch: str | None = None
    transformers: str | None = None
    unit: Omitted[str] = None
    """What was scored of the held-out documents: ``held-out text``, ``assistant turns``, or both;
    None if an older release evaluated the model, which scored text."""
    same_template: Omitted[bool] = None
    """Whether all models scored the same tokens of conversations; None without conversations. If
    not, only figures per byte can be compared."""
    refused: Omitted[dict[str, int]] = None
    """Held-out conversations that one of the models cannot render, by reason; none was scored."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The documents whose loss chose the checkpoint, and whether they had to be scored too."""

    documents: int = 0
    scored: bool = False


@dataclass(frozen=True, kw_only=True)
class ScoresFile:
    """The file of every document's score that belongs to the evaluation."""

    format: str
    version: int
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with the completions of the base model and of the candidate."""

    prompt: str
    before: str = ""
    after: str = ""
    messages: Omitted[tuple[dict[str, str], ...]] = None
    """The turns in which a chat model was asked; None for a text to continue."""
    first_token: Omitted[str] = None
    """The first token of the candidate's answer, and its probability."""
    p_first: Omitted[float] = None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge said about the answers of the candidate and of the reference: in how many
    questions the candidate's was better (``wins``) or worse, in both orders. Any other outcome is a
    tie. ``prompt`` is the text in which the judge was asked."""

    model: str
    url: str
    prompt: str
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True, kw_only=True)
class LearnedSample:
    """A held-out conversation as the candidate's template renders it; ``learned`` are half-open
    ranges of its characters."""

    text: str
    learned: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    step: int
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class WatchedProbe:
    """The watched prompt; each point is a line of training's probes.jsonl."""

    prompt: str = ""
    target: str = ""
    points: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class History:
    """The course of the training; each of ``steps`` is a line of its metrics.jsonl."""

    steps: tuple[dict[str, Any], ...] = ()
    validation: tuple[ValidationLoss, ...] = ()
    probe: WatchedProbe | None = None


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    documents: int | None = None
    bytes: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class CorpusCounts:
    """The corpus in numbers, with its sources."""

    documents_in: int | None = None
    documents: int | None = None
    bytes: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    train: SplitCounts = field(default_factory=SplitCounts)
    validation: SplitCounts = field(default_factory=SplitCounts)
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What the candidate was made from; the fields are those of `ModelFacts`."""

    base_model: BaseModel
    data_fingerprint: str = ""
    tokenizer_sha256: str = ""
    code_version: str = ""
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The verdict, and all that it rests on.

    A part is None or empty if an older release evaluated the model; ``probes`` is empty if none was
    configured, and None only if an older release left them out.
    """

    FORMAT: ClassVar[str] = "nudge.evaluation"
    VERSION: ClassVar[int] = 1

    run_id: str = ""
    recipe: str = ""
    created: str = ""
    """UTC, ISO 8601."""
    verdict: Verdict | None = None
    selection: Selection = field(default_factory=Selection)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    """Of the held-out texts, by model."""
    guards: tuple[GuardResult, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    incumbent: Incumbent | None = None
    models: dict[str, EvaluatedModel] = field(default_factory=dict)
    method: Method | None = None
    scores: ScoresFile | None = None
    probes: tuple[ProbeResult, ...] | None = None
    samples: tuple[Sample, ...] = ()
    judge: Omitted[Judged] = None
    """None if no judge was asked."""
    learned: Omitted[tuple[LearnedSample, ...]] = None
    """None for a model that was not trained on conversations."""
    history: History = field(default_factory=History)
    corpus: CorpusCounts | None = None
    lineage: Lineage | None = None
    training: Training | None = None
    cost: Omitted[Cost] = None
    """None if an older release evaluated the model."""


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation; raises `UserError` if the file is none of version 1."""
    return read_artifact(path, Evaluation)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation as JSON."""
    write_artifact(path, evaluation)
