"""The settings of the step `train`."""

from dataclasses import field
from typing import Annotated, Literal

from nudge.components.common.settings import settings
from pydantic import Field


@settings
class WatchedPrompt:
    """A prompt whose next token is watched while training goes on."""

    prompt: str
    target: str


@settings
class TrainSettings:
    base_model: str
    mode: Literal["full", "lora"] = "full"
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training tokens; `max_steps` may end it sooner."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps at the most; 0 sets no limit."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    batch_sequences: Annotated[int, Field(ge=1)] = 8
    """Sequences of one optimizer step."""
    micro_batch_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences of one forward and backward pass; lower it when memory runs out."""
    prefix_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the documents that begin after an end-of-document token, as in pretraining; the
    others begin bare, as a prompt does, so that the model is at home in both."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine down, or the full rate held and then a linear decay
    (warm-up-stable-decay)."""
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The schedule goes down towards this share of `learning_rate`."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps that the decay of `wsd` takes, at most those after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    lora_rank: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_targets: list[str] = field(
        default_factory=lambda: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
    )
    precision: Literal["float32", "bfloat16"] = "float32"
    """What matrix products are computed in; weights and optimizer state stay float32."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    watch: WatchedPrompt | None = None
    """The running example: its ten likeliest next tokens are kept every `watch_every` steps."""
    watch_every: Annotated[int, Field(ge=1)] = 5
    validation_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validation losses; 0 validates only at the start and the end."""
    validation_sequences: Annotated[int, Field(ge=1)] = 8
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 takes every core that the process may use."""
    seed: int = 1
