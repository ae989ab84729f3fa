"""Explains an out-of-memory error with the settings that reduce memory."""

import contextlib
from collections.abc import Iterator

import torch

from nudge.components.common.core.errors import UserError
from nudge.components.train.settings import TrainSettings


@contextlib.contextmanager
def explain_out_of_memory(settings: TrainSettings) -> Iterator[None]:
    """Turn torch's out-of-memory errors, on GPU or CPU, into a `UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU allocator has no error class: "DefaultCPUAllocator: can't allocate memory".
        if not (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "can't allocate memory" in f"{error}"
        ):
            raise
        lower = [
            f"train.{name} (now {value})"
            for name, value, least in (
                ("micro_batch_sequences", settings.micro_batch_sequences, 1),
                ("sequence_length", settings.sequence_length, 8),
            )
            if value > least
        ]
        other = [
            f"set train.{text}"
            for text, done in (
                ("activation_checkpointing: true", settings.activation_checkpointing is True),
                ("mode: lora", settings.mode != "full"),
            )
            if not done
        ]
        raise UserError(
            f"out of memory: lower {' or '.join(lower)}, or {', or '.join(other)}"
            if lower and other
            else f"out of memory: {''.join(lower) or ''.join(other)}"
        ) from error
