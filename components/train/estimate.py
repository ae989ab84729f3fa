"""The memory that training takes on one rank, computed from a model's config without weights.

Weights, gradients and optimizer state follow from the shapes. Activations come from one training
step on fake tensors, which have shapes and no memory: every allocation is counted until it is
freed, so that recomputation, adapters and mixed precision count as they are.
"""

import contextlib
import copy
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nudge.components.common.models.language_model import head_weight, hidden_states
from nudge.components.common.models.loading import meta_model
from nudge.components.train.models.adapt import adapt
from nudge.components.train.models.quantized import parameter_count
from nudge.components.train.models.recompute import keep_less
from nudge.components.train.settings import TrainSettings
from nudge.kernels.chunked import CPU_ROWS, row_stride, rows_on_cuda

MiB = 2**20
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""How architectures fail on fake tensors, for example in operations whose result has no fixed
shape, such as some routers of experts."""
RUNTIME_BYTES = {"cuda": 1024 * MiB, "cpu": 64 * MiB}
"""What torch itself takes: the context and libraries of a GPU, and the thread pools, products'
workspaces and allocator of a CPU process."""
SIMULATED_LAYERS = (1, 3)
"""A deeper model is simulated with these two depths, and its memory extrapolated linearly."""
_SIMULATED: dict[tuple[str, ...], tuple[tuple[int, ...], bool]] = {}
_COMPLETE: dict[tuple[str, ...], Any] = {}
"""Simulations and complete models, by config and settings: a plan tries several settings, and each
simulation takes seconds."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the peak of training, by part."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Of sharded weights: the layers that FSDP has gathered at one time, and their gradients. Of
    replicated ones: the buffers in which DDP exchanges gradients."""
    activations: int
    loss: int
    """The chunk of logits, and the head's gradients."""
    runtime: int

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, without adapters, and those that are trained."""

    parameters: int
    trainable: int


class Estimator:
    """Estimates for one model, whose ``config`` is all that is known, on ``ranks`` ranks.

    ``device`` is ``cuda`` or ``cpu``.
    """

    def __init__(self, config: Any, settings: TrainSettings, ranks: int, device: str) -> None:
        self.config, self.settings, self.ranks, self.device = config, settings, ranks, device
        self.simulated = True
        """Whether activations came from simulated steps so far, and not from a formula."""

    @functools.cached_property
    def _complete(self) -> Any:
        key = self._key(False)
        if key not in _COMPLETE:
            _COMPLETE[key] = self.model()
        return _COMPLETE[key]

    def model(self, layers: int = 0) -> Any:
        """The model on the meta device, with its adapters and dtypes; ``layers`` 0 means all."""
        config = copy.deepcopy(self.config)
        if layers:
            set_layers(config, layers)
        return adapt(meta_model(config), self.settings)

    def sizes(self) -> Sizes:
        model = self._complete
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Sizes(parameter_count(model), trained)

    def memory(self, rows: int = 0) -> Memory:
        """The memory of a micro-batch of ``rows`` sequences; 0 means that of the settings."""
        model = self._complete
        rows = rows or self.settings.micro_batch_sequences
        share = self.ranks if self._sharded else 1
        weights = _bytes(model.parameters()) // share
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        activations, loss = self._activations(rows)
        accumulates = self.settings.batch_sequences > self.ranks * rows
        gradients = 4 * trained // share
        if not accumulates and not self._sharded:
            # Gradients grow while activations are freed, so both are never complete at one time.
            activations = max(0, activations - gradients)
        return Memory(
            weights=weights,
            gradients=gradients,
            optimizer=2 * gradients,
            gathered=self._gathered(model, trained),
            activations=activations,
            loss=loss,
            runtime=RUNTIME_BYTES[self.device],
        )

    @property
    def _sharded(self) -> bool:
        return self.ranks > 1 and self.settings.parallelism == "fsdp"

    def _gathered(self, model: Any, trained: int) -> int:
        if self.ranks == 1:
            return 0
        if not self._sharded:
            return 4 * trained
        bfloat16 = self.settings.precision == "bfloat16"
        kinds = set(model._no_split_modules or ())
        layers = [m for m in model.modules() if type(m).__name__ in kinds]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        root = [p for p in model.parameters() if id(p) not in inside]

        def of(parameters: Any) -> tuple[int, int]:
            """Gathered bytes of a group, and how many parameters it trains."""
            found = list(parameters)
            trainable = sum(p.numel() for p in found if p.requires_grad)
            cast = torch.float32 if bfloat16 else None
            size = sum(p.numel() * (2 if p.dtype == cast else p.element_size()) for p in found)
            return size, trainable

        root_all, root_trained = of(root)
        sizes = [of(layer.parameters()) for layer in layers] or [(0, 0)]
        layer_all, layer_trained = max(sizes)
        # FSDP prefetches one layer, and copies gathered weights out of a buffer. Gradients are
        # copied into a float32 buffer that the ranks reduce.
        largest = max(layer_trained, root_trained)
        return root_all + 3 * layer_all + ((2 if bfloat16 else 4) + 4) * largest

    def _activations(self, rows: int) -> tuple[int, int]:
        """(Activations and temporaries at the peak, without the loss; the loss) of a micro-batch.

        Without the chunk of logits, both grow linearly with the rows.
        """
        one, two = (self._recomputing(number) for number in (1, 2))
        after_loss, peak, loss = (a + (b - a) * (rows - 1) for a, b in zip(one, two, strict=True))
        vocabulary = head_weight(self._complete).shape[0]
        bfloat16 = self.settings.precision == "bfloat16"
        chunk = self._chunk(rows * self.settings.sequence_length, vocabulary, bfloat16)
        return max(0, max(peak, after_loss + chunk) - loss - chunk), loss + chunk

    @property
    def layers(self) -> int:
        """The model's decoder layers; 0 if its config does not say."""
        depth = getattr(self.config.get_text_config(), "num_hidden_layers", 0)
        return depth if isinstance(depth, int) else 0

    def _recomputing(self, rows: int) -> tuple[int, ...]:
        """`_simulated_rows` with the setting `activation_checkpointing`, which may be a number."""
        count = self.settings.activation_checkpointing
        if isinstance(count, bool):
            return self._simulated_rows(rows, count)
        share = min(1.0, count / max(1, self.layers))
        none, every = (self._simulated_rows(rows, each) for each in (False, True))
        return tuple(round(a + share * (b - a)) for a, b in zip(none, every, strict=True))

    def _simulated_rows(self, rows: int, recompute: bool) -> tuple[int, ...]:
        low, high = SIMULATED_LAYERS
        if self.layers <= high:
            return self._simulated(rows, 0, recompute)
        one, other = (self._simulated(rows, depth, recompute) for depth in (low, high))
        return tuple(
            round(b + (b - a) / (high - low) * (self.layers - high))
            for a, b in zip(one, other, strict=True)
        )

    def _simulated(self, rows: int, layers: int, recompute: bool) -> tuple[int, ...]:
        """Bytes after the loss, at the peak, and of the loss; without the chunk of logits."""
        key = (*self._key(recompute), f"{self._sharded} {rows} {layers}")
        if key not in _SIMULATED:
            try:
                _SIMULATED[key] = self._run(rows, layers, recompute), True
            except FAILURES:
                _SIMULATED[key] = self._by_formula(rows, layers, recompute), False
        figures, simulated = _SIMULATED[key]
        self.simulated = self.simulated and simulated
        return figures

    def _by_formula(self, rows: int, layers: int, recompute: bool) -> tuple[int, ...]:
        """As `_simulated`: 34 bytes per token, hidden size and layer in 16 bits, and 2 of them if
        the layer is recomputed (Korthikanti et al., arXiv:2205.05198, without the attention matrix,
        which torch does not keep)."""
        head = head_weight(self._complete)
        width = head.shape[1] * rows * self.settings.sequence_length
        size = 2 if self.settings.precision == "bfloat16" else 4
        depth = layers or max(1, self.layers)
        layer = 17 * size * width
        kept = depth * (size * width if recompute else layer)
        loss = size * width + (head.numel() * head.element_size() if head.requires_grad else 0)
        return kept + loss, kept + loss + layer, loss

    def _key(self, recompute: bool) -> tuple[str, ...]:
        """The config and those settings on which a model and its simulation depend."""
        same = dataclasses.replace(
            self.settings, micro_batch_sequences=1, batch_sequences=1, parallelism="fsdp",
            processes=0, activation_checkpointing=recompute,
        )  # fmt: skip
        return self.config.to_json_string(), repr(same)

    def _run(self, rows: int, layers: int, recompute: bool) -> tuple[int, ...]:
        """Count the allocations of one training step on fake tensors, as `_simulated` returns."""
        settings, model = self.settings, self.model(layers)
        model.train()
        if recompute:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it has a new name
                model.gradient_checkpointing_enable(options)
        elif not settings.compile:
            keep_less(model)
        bfloat16 = settings.precision == "bfloat16"
        if bfloat16 and self._sharded:
            for parameter in model.parameters():  # FSDP casts what it gathers
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(torch.bfloat16)
        length = settings.sequence_length
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            ids, positions = (torch.zeros(rows, length, dtype=torch.int64) for _ in range(2))
            autocast: Any = contextlib.nullcontext()
            if bfloat16:
                autocast = torch.autocast("cpu", torch.bfloat16)
            there = [*model.parameters(), *model.buffers()]
            there += [p.grad for p in model.parameters() if p.grad is not None]
            with _Allocations(there) as counted:
                with autocast:
                    hidden = hidden_states(model, ids, positions)
                    kept = counted.now
                    loss = _Loss.apply(hidden.flatten(0, 1), head_weight(model))
                after_loss = counted.now
                del hidden
                loss.backward()
                peak = counted.peak
        return after_loss, peak, after_loss - kept

    def _chunk(self, rows: int, vocabulary: int, bfloat16: bool) -> int:
        """Bytes of the buffer of logits."""
        itemsize = 2 if bfloat16 else 4
        if self.device == "cuda":
            size = rows_on_cuda(rows, vocabulary * itemsize)
        else:
            size = max(min(rows // 14, CPU_ROWS[1]) // 16 * 16, CPU_ROWS[0])
        return min(size, rows) * row_stride(vocabulary, itemsize) * itemsize


class _Loss(torch.autograd.Function):
    """Allocates what the fused loss keeps: the gradients of hidden states and head."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
        gradients = [torch.empty_like(each) if each.requires_grad else None
                     for each in (hidden, weight)]  # fmt: skip
        ctx.save_for_backward(*gradients)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        return tuple(ctx.saved_tensors)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, while they are alive; those of the
    tensors that are ``there`` before do not count, although operations return views of them."""

    def __init__(self, there: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._known.update({tensor.untyped_storage(): 0 for tensor in there})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a model that asks for a value takes the branch of one unpacked document
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def _bytes(parameters: Iterator[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def set_layers(config: Any, layers: int) -> None:
    """Shorten the model of a config, in place."""
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
