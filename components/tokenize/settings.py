"""The settings of the step `tokenize`."""

from typing import Annotated, Literal

from pydantic import Field

from nudge.components.common.core.settings import settings
from nudge.components.common.models.end_of_document import END_OF_DOCUMENT

BYTES = 256
"""The least vocabulary of a byte-level tokenizer: every byte is a token."""


@settings
class TokenizeSettings:
    base_model: str = ""
    """The model whose tokenizer is taken; `tokenizer: train` needs none."""
    tokenizer: Literal["base_model", "train"] = "base_model"
    """The tokenizer of the base model, or a byte-level BPE trained on this corpus, for a model from
    scratch (`train.mode: scratch`)."""
    vocab_size: Annotated[int, Field(ge=BYTES + 1, le=1_000_000)] = 32_768
    """For `train`: tokens at the most, special ones included; a small corpus gives fewer."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    """For `train`: how often a pair must come to become a token."""
    special_tokens: tuple[str, ...] = ()
    """For `train`: tokens beside <|endoftext|>, such as those of a chat template."""
    sample_megabytes: Annotated[int, Field(ge=1)] = 500
    """For `train`: text to learn from at the most; documents stand in the order of their hash, so
    the first ones are a fair sample."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Cores that tokenize; 0: all that there are. It never changes the result."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or Ray Data: the shards of the corpus spread over a cluster. It
    never changes the result either."""
    ray_address: str = ""
    """For `ray`: the cluster to join, such as auto; empty: what RAY_ADDRESS names, else a Ray of
    this machine alone, with `processes` cores."""

    def __post_init__(self) -> None:
        if self.tokenizer == "base_model" and not self.base_model:
            raise ValueError("tokenizer base_model needs base_model; tokenizer train does without")
        least = BYTES + len(self.all_special_tokens)
        if self.vocab_size <= least:
            raise ValueError(
                f"vocab_size {self.vocab_size} has no room beside {BYTES} bytes and "
                f"{least - BYTES} special tokens; give more than {least}"
            )

    @property
    def all_special_tokens(self) -> list[str]:
        """What `train` gives an id of its own first, in this order, each once."""
        return list(dict.fromkeys([END_OF_DOCUMENT, *self.special_tokens]))
