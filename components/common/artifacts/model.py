"""The model artifact: a Hugging Face model folder with ``nudge.json`` (nudge.model, version 1).

``nudge.json`` records what the model was made from: base model, data, tokenizer, settings, code.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nudge.components.common.artifacts.chat_facts import ChatFacts
from nudge.components.common.artifacts.schema import Omitted, read_artifact, write_artifact

FILE = "nudge.json"


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that training started from; ``uri`` is empty if the weights were fresh."""

    uri: str
    sha256: str
    """Of its weights."""


@dataclass(frozen=True, kw_only=True)
class ServedWeights:
    """What quantizing the weights for serving saved, and what it cost."""

    kind: str
    """The setting `upload.quantize`."""
    bytes_before: int
    """Of all weight files."""
    bytes_after: int
    bits_per_byte_before: float
    """Of the trained model, over the validation rows of training."""
    bits_per_byte_after: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the training took. A field is None if the release that trained did not record it."""

    mode: Omitted[str] = None
    parameters: Omitted[int] = None
    trainable_parameters: Omitted[int] = None
    decayed_parameters: Omitted[int] = None
    device: Omitted[str] = None
    steps: Omitted[int] = None
    tokens: Omitted[int] = None
    seconds: Omitted[float] = None
    tokens_per_s: Omitted[float] = None
    ranks: Omitted[int] = None
    best_validation_loss: float | None = None
    """In nats per token; None if it was never finite."""
    weights_of_step: Omitted[int] = None
    base_bits_per_byte: Omitted[float] = None
    """Before training, with the base model's own weights; None unless the base was quantized."""
    quantized_bits_per_byte: Omitted[float] = None
    """The same with the quantized weights."""
    served: Omitted[ServedWeights] = None
    """None unless the weights were quantized for serving."""
    usage: Omitted[dict[str, float]] = None
    """What all ranks used, interrupted attempts included: the fields of
    `nudge.components.common.spending.usage.Usage`."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """The prompt whose continuation training watched, and the target after it."""

    prompt: str
    target: str


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a trained model was made from."""

    FORMAT: ClassVar[str] = "nudge.model"
    VERSION: ClassVar[int] = 1

    base_model: BaseModel
    data_fingerprint: str
    """The fingerprint of the corpus."""
    tokenizer_sha256: str
    settings: dict[str, Any]
    """The settings of the step `train`, by name."""
    seed: int
    code_version: str
    training: Training = field(default_factory=Training)
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens by split."""
    chat: Omitted[ChatFacts] = None
    """How the conversations of the data became text; None if there were none."""
    selected_on: tuple[int, ...] = ()
    """Positions, in the validation split, of the documents whose loss chose the checkpoint."""
    weights_sha256: Omitted[str] = None
    """Of the weights that training wrote; None if an older release trained the model."""

    @property
    def watch(self) -> Watch | None:
        watched = self.settings.get("watch")
        return Watch(prompt=watched["prompt"], target=watched["target"]) if watched else None


def read_model_facts(model: Path) -> ModelFacts:
    """The facts of a model folder; raises `UserError` if nudge did not train it."""
    return read_artifact(model / FILE, ModelFacts)


def write_model_facts(model: Path, facts: ModelFacts) -> None:
    """Write ``nudge.json`` into a model folder."""
    write_artifact(model / FILE, facts)
