"""The settings of the step `tokenize`."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from nudge.components.common.core.recipe import read_recipe, some_settings, step_settings
from nudge.components.common.core.settings import settings
from nudge.components.common.models.end_of_document import END_OF_DOCUMENT

BYTES = 256
"""The smallest vocabulary of a byte-level tokenizer: every byte is a token."""


@settings
class TokenizeSettings:
    base_model: str = ""
    """The model whose tokenizer is used; `tokenizer: train` needs none."""
    tokenizer: Literal["base_model", "train"] = "base_model"
    """The base model's tokenizer, or a byte-level BPE trained on this corpus for a model trained
    from scratch (`train.mode: scratch`)."""
    vocab_size: Annotated[int, Field(ge=BYTES + 1, le=1_000_000)] = 32_768
    """For `train`: maximum number of tokens, special ones included; a small corpus gives fewer."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    """For `train`: how often a pair must occur to become a token."""
    special_tokens: tuple[str, ...] = ()
    """For `train`: tokens in addition to <|endoftext|>, such as those of a chat template."""
    sample_megabytes: Annotated[int, Field(ge=1)] = 500
    """For `train`: maximum amount of text to learn from. Documents are in the order of their hash,
    so the first ones are a fair sample."""
    chat_template: str = ""
    """For conversations: a Jinja template instead of the base model's own. A base model without one
    gets ChatML."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """For conversations; defaults in a recipe to `train.learn`, which explains it."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """The maximum length of a conversation, in tokens; 0 means no limit. Defaults in a recipe to
    `train.sequence_length`, because a conversation is never cut by the end of a sequence."""
    too_long: Literal["keep_last", "keep_first", "drop"] = "keep_last"
    """What happens to a longer conversation: it loses its first turns (but not the system turn) or
    its last ones until it fits, or it is dropped. A single exchange that is too long is
    always dropped. The report counts all of them."""
    control_tokens: Literal["text", "refuse"] = "text"
    """A control token that a turn spells out, such as <|im_end|>: `text` encodes its characters as
    text, and `refuse` drops the conversation."""
    control_tokens_in_texts: Literal["text", "token"] = "text"
    """A control token that a document spells out: `text` encodes its characters as text, and
    `token` as the control token, for documents that were rendered with a chat template before."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Cores that tokenize; 0 means all. The number never changes the result."""
    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or Ray Data, which spreads the corpus shards over a cluster. It
    never changes the result."""
    ray_address: str = ""
    """For `ray`: the cluster to join, such as auto; empty: RAY_ADDRESS, or else a Ray on this
    machine only, with `processes` cores."""

    def __post_init__(self) -> None:
        if self.tokenizer == "base_model" and not self.base_model:
            raise ValueError("tokenizer: base_model needs base_model; tokenizer: train does not")
        least = BYTES + len(self.all_special_tokens)
        if self.vocab_size <= least:
            raise ValueError(
                f"vocab_size {self.vocab_size} leaves no room besides {BYTES} bytes and "
                f"{least - BYTES} special tokens; set it to more than {least}"
            )

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens of `train` in the order of their ids, each once."""
        return list(dict.fromkeys([END_OF_DOCUMENT, *self.special_tokens]))


@settings
class Trained:
    """What a recipe's section `train` says about conversations, with the defaults of `train`."""

    learn: Literal["assistant", "last", "all"] = "assistant"
    sequence_length: int = 256


def tokenize_settings(recipe: str, **overrides: Any) -> TokenizeSettings:
    """The settings in a recipe's text; those of conversations default to what `train` needs.

    ``overrides`` and errors are those of `step_settings`.
    """
    chosen = step_settings(TokenizeSettings, "tokenize", recipe, **overrides)
    own = read_recipe(recipe).get("tokenize") or {}
    trained = some_settings(Trained, "train", recipe)
    defaults: dict[str, Any] = {"learn": trained.learn, "max_tokens": trained.sequence_length}
    return replace(chosen, **{key: each for key, each in defaults.items() if key not in own})
