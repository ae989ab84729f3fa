"""The model that training starts from: a base model's weights, or fresh ones of a given size."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nudge.components.common.artifacts.tokens import Tokens
from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import local_model, model_sha256
from nudge.components.common.models.language_model import head_weight, hidden_states
from nudge.components.common.models.loading import Filler, empty_model
from nudge.components.train.settings import TrainSettings

HEAD_SIZE = 64
ASPECT = 64
"""Hidden size divided by layers in a derived shape; 20 to 128 in GPT-2 124M, SmolLM and Llama."""
TIED_BELOW = 1_000_000_000
"""Models with fewer parameters tie their embeddings to the head, as SmolLM and Llama 3.2 do."""


class Start:
    """The initial model: the ``folder`` and ``sha256`` of its base model, or a fresh config."""

    def __init__(self, settings: TrainSettings, tokenizer: Any, vocabulary: int) -> None:
        self.folder: Path | None = None
        self.sha256 = ""
        self._filler: Filler | None = None
        if settings.mode == "scratch":
            self._config = fresh_config(settings, tokenizer, vocabulary)
        else:
            self.folder = local_model(settings.base_model)
            self.sha256 = model_sha256(self.folder)

    def empty(self, seed: int) -> Any:
        """The model in float32 on the meta device, to be passed to `fill`; a fresh one has its
        weights, initialized as a pure function of the seed.

        Raises `UserError` if the base model's files are damaged or do not fit its config.
        """
        if self.folder is not None:
            model, self._filler = empty_model(self.folder)
            return model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            self._config, dtype=torch.float32, trust_remote_code=False
        )

    def fill(
        self,
        model: Any,
        device: torch.device,
        initial: Callable[[str, torch.Tensor], torch.Tensor | None],
    ) -> None:
        """Read this rank's part of the weights into an `empty` model, which may be sharded."""
        if self._filler is not None:
            self._filler.fill(model, device, initial)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of most weights in the base model's files."""
        assert self._filler is not None
        return self._filler.files.dtype

    def base_tensor(self, name: str, shape: torch.Size, model: Any) -> torch.Tensor:
        """A tensor of the base model in float32, by its name there."""
        assert self._filler is not None
        return self._filler.whole(name, shape, model)


def check_tokenizer(manifest: Tokens, settings: TrainSettings) -> None:
    """Raise `UserError` if the tokens' ids mean something else to the base model, or if their
    conversations have another mask than the settings ask for."""
    if manifest.tokenizer == "train" and settings.mode != "scratch":
        raise UserError(
            f"train.mode = {settings.mode}: the tokenizer was trained on the corpus, so its ids do "
            "not match the base model's; tokenize with tokenizer: base_model, or train with "
            "mode: scratch"
        )
    if manifest.chat is not None and manifest.chat.learn != settings.learn:
        raise UserError(
            f"train.learn = {settings.learn}, but the conversations were tokenized with "
            f"learn = {manifest.chat.learn}; tokenize again, and set train.learn instead of "
            "tokenize.learn"
        )


def check_vocabulary(model: Any, vocabulary: int, settings: TrainSettings) -> None:
    """Raise `UserError` if the model's embedding is smaller than this vocabulary."""
    rows = head_weight(model).shape[0]
    if vocabulary > rows:
        raise UserError(
            f"the tokens have a vocabulary of {vocabulary}, but the model "
            f"{settings.base_model or 'of train.model_config'} has embeddings for {rows}: if the "
            "tokens were made with another tokenizer, rerun tokenize with this base model's; if "
            "they were made with this one, it has added tokens without embeddings, so resize "
            "those (resize_token_embeddings in transformers), save the model and use that"
        )


@torch.no_grad()
def check_length(model: Any, settings: TrainSettings) -> None:
    """Raise `UserError` if the model has too few positions for `sequence_length`.

    Learned positions, as GPT-2's, are limited. Rotary positions are not, so they may be trained
    beyond the length in the config. The check runs the model with one layer and without weights.
    """
    length = settings.sequence_length
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or length <= positions:
        return
    last = torch.tensor([[length - 1]])
    short = _one_layer(model)
    try:
        hidden_states(short, torch.zeros_like(last), last)
    except (IndexError, RuntimeError):  # an embedding raises the first, a sine table the second
        raise UserError(
            f"train.sequence_length = {length}: {type(model).__name__} has {positions} positions; "
            f"lower it to {positions} or less"
        ) from None


def _one_layer(model: Any) -> Any:
    """A copy of the model on the CPU with one layer and arbitrary weights."""
    kinds = set(model._no_split_modules or ())
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and {type(each).__name__ for each in module} & kinds
    }
    # Leave the other layers out of the copy, so that it takes little memory.
    left_out = {id(each): each for module in layers.values() for each in list(module)[1:]}
    short = copy.deepcopy(model, dict(left_out))
    for name in layers:
        module = short.get_submodule(name)
        del module[1:]
    meta = any(parameter.is_meta for parameter in short.parameters())
    return short.to_empty(device="cpu") if meta else short


def fresh_config(settings: TrainSettings, tokenizer: Any, vocabulary: int) -> Any:
    """The config of a model from scratch, with the tokenizer's vocabulary and special tokens.

    Raises `UserError` if transformers cannot build a causal language model from it.
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

    A layer has four attention matrices of D x D and three of D x I with I = 8 D / 3, so 12 D^2.
    Among the shapes within 5 % of the size, it picks the one whose hidden size is nearest to
    `ASPECT` times its layers. Raises `UserError` if ``size`` cannot be parsed.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", size)
    if match is None:
        raise UserError(
            f"train.model_size = {size!r}: expected a number followed by M or B, such as 124M"
        )
    wanted = float(match[1]) * {"M": 1e6, "B": 1e9}[match[2]]
    tied = wanted < TIED_BELOW

    def parameters(layers: int, hidden: int) -> int:
        inner = _inner(hidden)
        layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
        return (1 if tied else 2) * vocabulary * hidden + layers * layer + hidden

    shapes = [(layers, 64 * n) for layers in range(2, 129) for n in range(1, 257)]
    misses = {shape: abs(parameters(*shape) / wanted - 1) for shape in shapes}
    candidates = [shape for shape in shapes if misses[shape] <= 0.05]
    if not candidates:
        candidates = [min(shapes, key=lambda shape: misses[shape])]
    layers, hidden = min(candidates, key=lambda s: (abs(s[1] / s[0] / ASPECT - 1), misses[s]))
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
