"""Run a causal language model: hidden states and head separately, next-token probabilities."""

import math
import os
import types
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from nudge.components.common.core.environment import usable_cores
from nudge.components.common.core.errors import UserError, one_line
from nudge.components.common.models.end_of_document import document_start_id
from nudge.components.common.models.loading import empty_model
from nudge.components.common.models.serving_quantization import load_quantized, quantization_of
from nudge.kernels import fused_linear_cross_entropy
from nudge.kernels.cpu_products import linear, onednn_is_faster

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def set_up_torch(threads: int, seed: int, deterministic: bool = True) -> None:
    """Fix torch's threads and seed, and if ``deterministic`` its algorithms."""
    # cuBLAS refuses deterministic algorithms without it; it is read at the first use of a GPU
    # (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads or usable_cores())
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    # No code reads memory before writing it; filling it took 7 % of a training step on a CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def load_model(folder: Path) -> Any:
    """Load a causal LM in float32, in evaluation mode, from safetensors and without remote code.

    A model that was quantized for serving computes as `load_quantized` says. Raises `UserError` if
    the weights are missing, damaged or do not fit the config.
    """
    if quantization_of(folder):
        return load_quantized(folder)
    model, filler = empty_model(folder)
    filler.fill(model, torch.device("cpu"))
    return model


@torch.no_grad()
def check_generates(model: Any, tokenizer: Any, uri: str) -> None:
    """Raise `UserError` unless a base model generates one token, before it is trained for hours."""
    first = document_start_id(tokenizer)
    ids = torch.tensor([[0 if first is None else first]], device=model.device)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=1, pad_token_id=0)
    own, training = model.generation_config, model.training
    model.generation_config = greedy
    try:
        made = model.eval().generate(ids, attention_mask=torch.ones_like(ids))
    except Exception as error:
        raise UserError(f"base_model {uri} cannot generate a token: {one_line(error)}") from error
    finally:
        model.generation_config = own
        model.train(training)
    assert made.shape[1] == 2, made.shape


def speed_up_products(model: nn.Module) -> None:
    """Use the faster of torch's two libraries in the linear layers of a model on a CPU.

    Layers of a quantized model stay, because their own code rounds their inputs.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and not hasattr(module, "quantization_scheme")
    ]
    for layer in layers:
        if layer.weight.device.type == "cpu" and onednn_is_faster():
            layer.forward = types.MethodType(_linear, layer)


def _linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, self.weight, self.bias)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, from known code only; it appends no end token to a text."""
    return without_end_token(
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )


def without_end_token(tokenizer: Any) -> Any:
    """The same tokenizer, changed to append nothing to a text.

    Some bases append the end token (``add_eos_token``), so that every prompt would end where its
    continuation should begin. Tokens before a text, such as BOS, stay.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    after = next((n for n in range(len(framed)) if framed[n : n + len(plain)] == plain), 0)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if after + len(plain) >= len(framed) or backend is None:
        return tokenizer
    before = tokenizer.convert_ids_to_tokens(framed[:after])
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
    tokenizer.init_kwargs.pop("add_eos_token", None)
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A"],
        pair=[*before, "$A", "$B"],
        special_tokens=list(zip(before, framed[:after], strict=True)),
    )
    return tokenizer


def hidden_states(model: Any, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The last hidden states [rows, length, D], before the head.

    Tokens attend to each other only within a run of rising positions: a position of 0 starts a new
    document (transformers masks packed sequences if it gets positions and no mask).
    """
    states: torch.Tensor = model.base_model(
        input_ids=inputs, position_ids=positions, use_cache=False
    ).last_hidden_state
    return states


def head_weight(model: Any) -> torch.Tensor:
    """The head's weight [V, D], shared with the embeddings in tied models."""
    weight: torch.Tensor = model.get_output_embeddings().weight
    return weight


def next_token_loss(
    model: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    reduction: Literal["sum", "none"],
    learned: int | None = None,
) -> torch.Tensor:
    """The loss in nats of last hidden states [N, D] for targets [N], ignoring targets of -100.

    If ``learned``, the number of other targets, is known, a GPU skips the head for ignored ones.

    It applies everything that the model does between hidden states and logits, without computing
    all logits: the head with its bias (Phi), Granite's and Cohere's scale of the logits, and
    Gemma's soft cap. `check_loss` detects a model that does anything else.
    """
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return fused_linear_cross_entropy(
        hidden if scale == 1.0 else hidden * scale,
        head_weight(model),
        targets,
        bias=getattr(model.get_output_embeddings(), "bias", None),
        reduction=reduction,
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        valid_rows=learned,
    )


@torch.no_grad()
def check_loss(model: Any) -> None:
    """Raise `UserError` if `next_token_loss` differs from the loss of the model's own logits.

    It uses a short row whose targets are the least likely tokens: a scale moves all their losses in
    the same direction, and far.
    """
    ids = torch.arange(8, device=model.device)[None] % head_weight(model).shape[0]
    positions = torch.arange(8, device=model.device)[None]
    training = model.training
    model.eval()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    rounding = 1e-4 if logits.dtype == torch.float32 else 1e-2
    logits = logits.float()
    targets = logits.argmin(-1)
    own = nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    ours = next_token_loss(model, hidden_states(model, ids, positions)[0], targets, "sum").item()
    model.train(training)
    # NaN weights are reported elsewhere.
    if math.isfinite(own) and not math.isclose(own, ours, rel_tol=rounding):
        raise UserError(
            f"{type(model).__name__}: the loss of its own logits on a short row is {own:.4f} nats, "
            f"but that of its hidden states and its head is {ours:.4f}. In transformers it changes "
            "its logits in a way that nudge does not support; choose another architecture"
        )


@torch.no_grad()
def probabilities_along(model: Any, prompt: list[int], target: list[int]) -> torch.Tensor:
    """P(next token) at each token of a target that follows a prompt, in one forward pass.

    float32 [tokens of the target (at least 1), V]; the first row is P(next token) after the prompt.
    """
    inputs = torch.tensor([prompt + target[:-1]], device=model.device)
    logits = model(input_ids=inputs, use_cache=False).logits[0, len(prompt) - 1 :]
    return torch.softmax(logits.float(), dim=-1)


def target_probability(probabilities: torch.Tensor, target: list[int]) -> float:
    """P of a target, from the result of `probabilities_along`: the product over its tokens."""
    ids = torch.tensor(target, device=probabilities.device)[:, None]
    return float(probabilities.gather(1, ids).double().prod())


def likeliest(probabilities: torch.Tensor, tokenizer: Any, count: int = 10) -> list[dict[str, Any]]:
    """The likeliest next tokens in descending order: ``[{"token", "id", "p"}]``."""
    best = torch.topk(probabilities, min(count, probabilities.numel()))
    return [
        {"token": tokenizer.decode([index]), "id": index, "p": p}
        for p, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def target_ids(tokenizer: Any, target: str) -> list[int]:
    """The ids of a target's tokens after a prompt; raises `UserError` if it has none."""
    ids: list[int] = tokenizer(target, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(
            f"the tokenizer produces no token for the target {target!r}; use another target"
        )
    return ids
