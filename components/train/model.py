"""The model that training starts from: a base model's weights, or fresh ones of a chosen shape."""

import re
from pathlib import Path
from typing import Any

import torch

from nudge.components.common.artifacts.tokens import Tokens
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import local_model, model_sha256
from nudge.components.common.models.language_model import head_weight, hidden_states, load_model
from nudge.components.train.settings import TrainSettings

HEAD_SIZE = 64
ASPECT = 64
"""Hidden size over layers of a derived shape: GPT-2 124M, SmolLM and Llama have 20 to 128."""
TIED_BELOW = 1_000_000_000
"""Smaller models share their embeddings with their head, as SmolLM and Llama 3.2 do."""


class Start:
    """A model's beginning: its ``config``, and the ``folder`` and ``sha256`` of its base model."""

    def __init__(self, settings: TrainSettings, tokenizer: Any, vocabulary: int) -> None:
        self.folder: Path | None = None
        self.sha256 = ""
        if settings.mode == "scratch":
            self._config = fresh_config(settings, tokenizer, vocabulary)
        else:
            self.folder = local_model(settings.base_model)
            self.sha256 = model_sha256(self.folder)

    def model(self, seed: int) -> Any:
        """The model in float32: loaded, or initialised as a pure function of the seed."""
        if self.folder is not None:
            return load_model(self.folder)
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self._config, dtype=torch.float32)


def check_tokenizer(manifest: Tokens, settings: TrainSettings) -> None:
    """Raise `UserError` if a base model would meet ids that mean something else to it."""
    if manifest.tokenizer == "train" and settings.mode != "scratch":
        raise UserError(
            f"train.mode {settings.mode}: the tokens' tokenizer was trained on the corpus, and the "
            "base model knows other ids; tokenize with tokenizer: base_model, or train with "
            "mode: scratch"
        )


def check_vocabulary(model: Any, vocabulary: int, settings: TrainSettings) -> None:
    """Raise `UserError` if tokens of this vocabulary cannot be looked up in the model."""
    rows = head_weight(model).shape[0]
    if vocabulary > rows:
        raise UserError(
            f"the tokens have a vocabulary of {vocabulary}, the model "
            f"{settings.base_model or 'of train.model_config'} has {rows}: tokenize again with "
            "this base model's tokenizer"
        )


@torch.no_grad()
def check_length(model: Any, settings: TrainSettings) -> None:
    """Raise `UserError` if the model, on a CPU, has no positions for rows as long as the settings'.

    Learned positions end, as GPT-2's; rotary ones do not, and may be trained beyond the length that
    the config names.
    """
    length = settings.sequence_length
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if named is None or length <= named:
        return
    last = torch.tensor([[length - 1]])
    try:
        hidden_states(model, torch.zeros_like(last), last)
    except (IndexError, RuntimeError):  # from an embedding, from a table of sines
        raise UserError(
            f"train.sequence_length = {length}: {type(model).__name__} has {named} positions; "
            "lower it to that"
        ) from None


def fresh_config(settings: TrainSettings, tokenizer: Any, vocabulary: int) -> Any:
    """The config of a model from scratch, with the tokenizer's vocabulary and special tokens.

    Raises `UserError` if the size or the config is none that transformers can build.
    """
    from transformers import AutoConfig

    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    values: dict[str, Any] = {"vocab_size": vocabulary, **special}
    if settings.model_size:
        values |= llama_shape(settings.model_size, vocabulary)
        values["max_position_embeddings"] = max(2048, settings.sequence_length)
    values |= settings.model_config
    kind = values.pop("model_type", "")
    try:
        config = AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"train.model_config: transformers cannot build it: {error}") from None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"train.model_config: {kind} is not a causal language model")
    return config


def llama_shape(size: str, vocabulary: int) -> dict[str, Any]:
    """A Llama of about ``size`` parameters (10M, 1.5B), embeddings included.

    A layer has four attention matrices of D x D and three of D x I with I = 8 D / 3, so 12 D^2. Of
    the shapes within 5 % of the size, the one whose hidden size is nearest `ASPECT` times its
    layers is taken. Raises `UserError` for what is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", size)
    if match is None:
        raise UserError(f"train.model_size = {size!r}: expected a number with M or B, such as 124M")
    wanted = float(match[1]) * {"M": 1e6, "B": 1e9}[match[2]]
    tied = wanted < TIED_BELOW

    def parameters(layers: int, hidden: int) -> int:
        inner = _inner(hidden)
        layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
        return (1 if tied else 2) * vocabulary * hidden + layers * layer + hidden

    shapes = [(layers, 64 * n) for layers in range(2, 129) for n in range(1, 257)]
    misses = {shape: abs(parameters(*shape) / wanted - 1) for shape in shapes}
    near = [shape for shape in shapes if misses[shape] <= 0.05]
    if not near:
        near = [min(shapes, key=lambda shape: misses[shape])]
    layers, hidden = min(near, key=lambda s: (abs(s[1] / s[0] / ASPECT - 1), misses[s]))
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": _inner(hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_SIZE,
        "num_key_value_heads": hidden // HEAD_SIZE,
        "tie_word_embeddings": tied,
    }


def _inner(hidden: int) -> int:
    """8/3 of the hidden size (Llama, arXiv:2302.13971), rounded to a multiple of 64."""
    return round(8 * hidden / 3 / 64) * 64
