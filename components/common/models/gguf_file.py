"""Write a model folder as one GGUF file, for llama.cpp and the programs built on it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.base_model import gguf_tokenizer, read_once
from nudge.components.common.models.language_model import load_model, load_tokenizer
from nudge.components.common.models.loading import base_name, empty_model, model_config

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Model types of transformers, and gguf's names of their architectures."""
TOLERANCE = 0.02
"""How far a next-token probability of the file may be from the folder's."""
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which llama.cpp divides the rotary frequencies."""
CHECKED_TEXT = 'The Eiffel Tower is located in Paris, and 12 people said: "Hello, world!"\n'


def write_gguf(folder: Path, path: Path, note: Callable[[str], None] = lambda stage: None) -> float:
    """Write the model in ``folder`` to ``path``, load it again and compare it.

    Returns the largest difference of a next-token probability. Raises `UserError` if the
    architecture or the tokenizer has no form in GGUF that nudge can write, or if the difference is
    above `TOLERANCE`; then ``path`` is not written.
    """
    config = model_config(folder)
    _check(config, folder)
    part = path.with_name(f".{path.name}.part")
    try:
        note("writing the GGUF file")
        _write(folder, config, part)
        note("loading the GGUF file again, to compare it")
        difference = _difference(folder, part)
        if difference > TOLERANCE:
            raise UserError(
                f"the GGUF file gives next-token probabilities that differ by {difference:.3f} "
                f"from those of {folder}; at most {TOLERANCE} is accepted, so it was not kept"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return difference


def _check(config: Any, folder: Path) -> None:
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{folder} is a {config.model_type} model, which nudge cannot write as GGUF; it can "
            f"write {', '.join(ARCHITECTURES)}. Export it with --format hf"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{folder} is quantized for serving, and nudge cannot write that as GGUF; export it "
            "with --format hf, or train it without upload.quantize"
        )
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    rope = _rope_type(config)
    unknown = [
        text
        for text, found in (
            (f"scales its rotary positions ({rope})", rope not in ("default", "llama3")),
            ("attends to a sliding window", window < config.max_position_embeddings),
            ("has biases in its attention", getattr(config, "attention_bias", False)),
            ("has biases in its MLPs", getattr(config, "mlp_bias", False)),
        )
        if found
    ]
    if unknown:
        raise UserError(
            f"{folder} {unknown[0]}, which nudge cannot write as GGUF; export it with --format hf"
        )


def _rope_type(config: Any) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def _write(folder: Path, config: Any, path: Path) -> None:
    import gguf

    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    _add_shape(writer, config)
    model, filler = empty_model(folder)
    half = filler.files.dtype == torch.bfloat16
    stored = gguf.GGMLQuantizationType.BF16 if half else gguf.GGMLQuantizationType.F32
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if half else gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, folder, config.vocab_size)
    if _rope_type(config) == "llama3":
        writer.add_tensor(ROPE_FACTORS, _rope_factors(config).numpy())
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        target = names.get_name(base_name(name), try_suffixes=(".weight", ".bias"))
        tensor = filler.whole(name, parameter.shape, model)
        if arch == gguf.MODEL_ARCH.LLAMA:
            tensor = _permuted(name, tensor, config)
        values = tensor.numpy()
        if tensor.dim() == 1:
            writer.add_tensor(target, values)
        else:
            writer.add_tensor(target, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_size)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_vocab_size(config.vocab_size)


def _rope_factors(config: Any) -> torch.Tensor:
    """By what the scaling of Llama 3.1 and later divides each rotary frequency, [head size / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
    return plain / scaled


def _permuted(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp rotates neighboring values of a head, transformers the two halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((n for part, n in heads.items() if f".{part}." in name), None)
    if count is None:
        return tensor
    shape = tensor.shape
    return tensor.view(count, 2, shape[0] // count // 2, *shape[1:]).transpose(1, 2).reshape(shape)


def _add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    import gguf

    tokenizer = load_tokenizer(folder)
    kind = type(tokenizer.backend_tokenizer.model).__name__
    pre = str(tokenizer.backend_tokenizer.pre_tokenizer)
    if kind != "BPE" or "ByteLevel" not in pre:
        raise UserError(
            f"{folder} has a tokenizer of the kind {kind} without byte-level tokens, which nudge "
            "cannot write as GGUF; export it with --format hf"
        )
    special = set(tokenizer.all_special_ids)
    added = tokenizer.get_added_vocab()
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(rows):
        token = by_id.get(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        if token is None:
            types.append(gguf.TokenType.UNUSED)
        elif index in special:
            types.append(gguf.TokenType.CONTROL)
        else:
            user = token in added
            types.append(gguf.TokenType.USER_DEFINED if user else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(pre))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows).add_to_gguf(writer, quiet=True)


def _pre_tokenizer(pre: str) -> str:
    """llama.cpp's name of a pre-tokenizer, by what tells the known ones apart."""
    if r"\p{N}{1,3}" in pre.replace("\\\\", "\\"):
        return "llama-bpe"
    if r"\p{N}" in pre.replace("\\\\", "\\"):
        return "qwen2"
    return "smollm" if "Digits" in pre else "gpt-2"


@torch.no_grad()
def _difference(folder: Path, path: Path) -> float:
    ids = load_tokenizer(folder)(CHECKED_TEXT)["input_ids"]
    inputs = torch.tensor([ids])
    expected = load_model(folder)(inputs).logits.float().softmax(-1)
    with read_once():
        again = _read_back(path)
        tokens = gguf_tokenizer(path)(CHECKED_TEXT)["input_ids"]
    found = again(inputs).logits.float().softmax(-1)
    if tokens != ids:
        first = next(
            at for at, (one, other) in enumerate(itertools.zip_longest(ids, tokens)) if one != other
        )
        raise UserError(
            f"the tokenizer of the GGUF file splits a text differently from token {first} on; "
            "export the model with --format hf"
        )
    return float((found[..., : expected.shape[-1]] - expected).abs().max())


def _read_back(path: Path) -> Any:
    """The model in a GGUF file, with what transformers does not read there: the size of a head,
    and the factors of the rotary frequencies."""
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    config.head_dim = int(reader.fields[f"{arch}.attention.key_length"].contents())
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            model.model.rotary_emb.inv_freq /= torch.tensor(tensor.data)
    return model.eval()
