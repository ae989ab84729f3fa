"""Layers that keep less: fewer bytes, the same bits, and no additional matrix products."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from nudge.components.common.core.errors import UserError
from nudge.components.train.models.network import Network
from nudge.components.train.models.recompute import keep_less, recompute_layers
from nudge.components.train.settings import TrainSettings


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mm" in str(func)
        return func(*args, **(kwargs or {}))


def make(model_type: str) -> Any:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape))


def step(model: Any, autocast: bool) -> tuple[list[torch.Tensor], int, int]:
    """The gradients of a step, its number of products, and the bytes kept for its backward pass."""
    seen: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if not isinstance(value, nn.Parameter):
            seen[value.data_ptr()] = value.numel() * value.element_size()
        return value

    ids = torch.arange(40).view(2, 20) % 64
    with Products() as products:
        saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
        with saved, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return [weight.grad for weight in model.parameters()], products.count, sum(seen.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma"])
def test_fewer_bytes_the_same_bits_and_no_additional_product(
    model_type: str, autocast: bool
) -> None:
    plain = make(model_type)
    recomputing = copy.deepcopy(plain)
    keep_less(recomputing)
    recomputing = copy.deepcopy(recomputing)  # a copy must call its own layers
    plain_gradients, plain_products, plain_bytes = step(plain, autocast)
    gradients, products, kept_bytes = step(recomputing, autocast)
    assert all(one.equal(other) for one, other in zip(gradients, plain_gradients, strict=True))
    assert products == plain_products
    assert kept_bytes < 0.75 * plain_bytes


def test_a_different_mlp_stays_unchanged() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 8), nn.Linear(4, 8)
            self.down_proj, self.act_fn = nn.Linear(8, 4), nn.SiLU()

        def forward(self, x: torch.Tensor) -> Any:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + 1)

    for model in (Other(), make("gpt2")):
        keep_less(model)
        assert not any("forward" in vars(module) for module in model.modules())


def test_an_mlp_with_adapters_stays_unchanged() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(target_modules=["down_proj"], r=2))
    keep_less(model)
    changed = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert set(changed) == {"LlamaRMSNorm"}


def test_a_number_of_layers_is_recomputed() -> None:
    plain = make("llama")
    found = []
    for count in (False, 1, 2, True):
        settings = TrainSettings(base_model="x", activation_checkpointing=count)
        found.append(step(Network(copy.deepcopy(plain), settings).model, autocast=False))
    kept = [each[2] for each in found]
    assert kept[0] > kept[1] > kept[2] == kept[3]
    for gradients, *_ in found:
        for one, other in zip(gradients, found[0][0], strict=True):
            torch.testing.assert_close(one, other)


def test_a_model_that_recomputes_all_layers_or_none_says_so() -> None:
    model = make("llama")
    settings = TrainSettings(base_model="x", activation_checkpointing=1)
    with pytest.raises(UserError, match="recomputes all layers or none; set it to true or false"):
        recompute_layers(model, [nn.Identity(), nn.Identity()], settings)
