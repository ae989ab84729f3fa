"""The model as the loop sees it: a summed loss over rows, on one rank or many."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from nudge.components.common.core.errors import UserError
from nudge.components.common.models.language_model import (
    hidden_states,
    next_token_loss,
    probabilities_along,
    speed_up_products,
)
from nudge.components.train.data import IGNORED, Rows
from nudge.components.train.models.recompute import keep_less, recompute_layers
from nudge.components.train.ranks import Ranks
from nudge.components.train.settings import TrainSettings


class _NextToken(nn.Module):
    """The model and its loss in one forward pass, so that FSDP gathers the head for both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Rows | tuple[list[int], list[int]] | Callable[[Any], None]) -> Any:
        """The summed loss of rows in nats, or `probabilities_along` for (prompt, target) ids, or
        nothing after a check of the model."""
        if isinstance(rows, tuple):
            return probabilities_along(self.model, *rows)
        if callable(rows):
            return rows(self.model)
        hidden = hidden_states(self.model, rows.inputs, rows.positions)
        targets = rows.targets.flatten()
        return next_token_loss(self.model, hidden.flatten(0, 1), targets, "sum", rows.learned)


class Network:
    """A causal language model, prepared for training on these ranks; ``model`` is trained in place.

    The model may be on the meta device: ``fill`` then gives this rank its part of the weights, on a
    device, once the model is sharded. With many ranks, the settings choose between sharded
    parameters (FSDP2: Zhao et al., arXiv:2304.11277, by `fully_shard`) and replicated ones (DDP).
    """

    def __init__(
        self,
        model: Any,
        settings: TrainSettings,
        ranks: Ranks | None = None,
        fill: Callable[[Any, torch.device], None] = lambda model, device: None,
    ) -> None:
        self.model, self.settings, self.ranks = model, settings, ranks or Ranks()
        self.sharded = self.ranks.world > 1 and settings.parallelism == "fsdp"
        if not any(parameter.is_meta for parameter in model.parameters()):
            model.to(self.ranks.device)
        if settings.activation_checkpointing:
            recompute_layers(model, self._layers(), settings)
        elif not settings.compile:  # the compiler decides itself what to keep
            keep_less(model)
        if settings.compile:
            for layer in self._layers():
                layer.compile()
        self._module: Any = _NextToken(model)
        self._ddp: Any = None
        if self.sharded:
            self._shard()
        fill(model, self.ranks.device)
        if not settings.compile:
            speed_up_products(model)
        if self.ranks.world > 1 and not self.sharded:
            devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
            self._ddp = nn.parallel.DistributedDataParallel(self._module, device_ids=devices)

    def summed_loss(self, rows: Rows) -> torch.Tensor:
        """The loss summed over this rank's rows, in nats; differentiable."""
        training = self._ddp is not None and torch.is_grad_enabled()
        module = self._ddp if training else self._module
        with self.precision():
            loss: torch.Tensor = module(_on(rows, self.ranks.device))
        self._reshard_without_backward()
        return loss

    def local_loss(self, rows: Rows) -> torch.Tensor:
        """Like `summed_loss`, but DDP replicas exchange nothing, not even in the backward pass."""
        with self.precision():
            loss: torch.Tensor = self._module(_on(rows, self.ranks.device))
        return loss

    @torch.no_grad()
    def check(self, check: Callable[[Any], None]) -> None:
        """Call ``check`` with the model, whose weights are complete; every rank must call this."""
        with self.precision():
            self._module(check)
        self._reshard_without_backward()

    @torch.no_grad()
    def probabilities(self, prompt: list[int], target: list[int]) -> torch.Tensor:
        """`probabilities_along` for a prompt's and a target's ids; every rank must call this."""
        with self.precision():
            probabilities: torch.Tensor = self._module((prompt, target))
        self._reshard_without_backward()
        return probabilities

    def _reshard_without_backward(self) -> None:
        """FSDP keeps the root's weights gathered until the backward pass, which may never come. An
        optimizer or checkpoint created then would treat the gathered weights as the model's."""
        if self.sharded and not torch.is_grad_enabled():
            self._module.reshard()

    def last_of_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Wrap a micro-batch: ranks exchange gradients only with the last one of a batch."""
        if self.sharded:
            self._module.set_requires_gradient_sync(last)
        elif self._ddp is not None and not last:
            return self._ddp.no_sync()
        return contextlib.nullcontext()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Wrap computation: autocast to bfloat16 if the settings request it."""
        if self.settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def _layers(self) -> list[nn.Module]:
        kinds = set(self.model._no_split_modules or ())
        return [module for module in self.model.modules() if type(module).__name__ in kinds]

    def _shard(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world,))
        policy = MixedPrecisionPolicy()
        if self.settings.precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in self._layers():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self._module, mesh=mesh, mp_policy=policy)


def precision_on(device: torch.device, setting: Literal["float32", "bfloat16", "auto"]) -> Any:
    """The precision that ``setting`` selects on a device.

    On a CPU without bfloat16 instructions, products in bfloat16 are far slower than in float32:
    with only AVX2, SmolLM2-135M trained at 4 tokens/s in bfloat16 and 71 in float32. Raises
    `UserError` for bfloat16 on a GPU without it.
    """
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if setting == "bfloat16" and not supported:
            raise UserError(
                f"train.precision = bfloat16: {torch.cuda.get_device_name(device)} has no bfloat16 "
                "instructions; set it to float32 or auto"
            )
    else:
        capabilities = torch.cpu.get_capabilities()
        supported = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if setting != "auto":
        return setting
    return "bfloat16" if supported else "float32"


def _on(rows: Rows, device: torch.device) -> Rows:
    """The rows on a device; the learned targets are counted here, where that does not wait."""
    learned = int((rows.targets != IGNORED).sum())
    inputs, targets, positions = (
        part.to(device) for part in (rows.inputs, rows.targets, rows.positions)
    )
    return Rows(inputs, targets, positions, learned)


@torch.no_grad()
def check_document_masking(network: Network, vocabulary: int) -> None:
    """Raise `UserError` if this architecture lets a packed document attend to the one before it."""
    length = 8
    ids = torch.arange(2 * length)[None] % vocabulary
    other = ids.clone()
    other[0, :length] = (other[0, :length] + 1) % vocabulary
    targets = ids.clone()
    targets[0, :length] = IGNORED
    positions = torch.arange(length).repeat(2)[None]
    network.model.eval()
    one, two = (network.summed_loss(Rows(inputs, targets, positions)) for inputs in (ids, other))
    network.model.train()
    if not torch.allclose(one, two, rtol=1e-6):
        raise UserError(
            f"{type(network.model).__name__} lets a packed document attend to the one before it, "
            "because its attention in transformers ignores position ids; choose another "
            "architecture"
        )
