"""Disk and memory of this machine, compared with what the base model alone needs."""

import os
import shutil
from pathlib import Path

from nudge.components.common.core.errors import UserError

CGROUP = Path("/sys/fs/cgroup/memory.max")
COPIES_ON_DISK = 3
"""A run writes the model, its upload into the embedded store, and the copy that is served."""
BYTES = {"full": 16, "scratch": 16, "lora": 6}
"""Memory per parameter: float32 weights, gradients and AdamW's two moments; or, with LoRA, bfloat16
weights and float32 ones while the adapters are merged."""

LARGE = 0.3
"""A model counts as large if training all of its weights takes more than this share of memory."""


def is_large(parameters: float) -> bool:
    """Whether training this many parameters, at 16 bytes each, takes much of this machine."""
    return BYTES["full"] * parameters > LARGE * memory_bytes()


def check_machine(
    parameters: int,
    mode: str,
    folder: Path,
    on_cpu: bool,
    disk_bytes: int = COPIES_ON_DISK * 4,
    remedy: str = "free some, or set NUDGE_HOME to a folder elsewhere",
) -> None:
    """Raise `UserError` if the disk of ``folder`` or this machine's memory is too small.

    ``disk_bytes`` are per parameter; ``remedy`` says what to do about a small disk. Only a model
    that cannot fit is refused: activations and the operating system need more.
    """
    disk = disk_bytes * parameters
    there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    if free < disk:
        raise UserError(
            f"the disk of {there} has {_size(free)} free, and a model of {parameters:,} parameters "
            f"needs about {_size(disk)}; {remedy}"
        )
    memory, installed = BYTES[mode] * parameters, memory_bytes()
    if on_cpu and 0 < installed < memory:
        less = "" if mode == "lora" else ", set train.mode: lora"
        raise UserError(
            f"this machine has {_size(installed)} of memory; training {parameters:,} parameters "
            f"with train.mode: {mode} needs at least {_size(memory)}; use a smaller base model"
            f"{less}, or a larger machine"
        )


def memory_bytes() -> int:
    """The memory that this process may use: of the machine, or its container's limit; 0 unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
    try:
        return min(total, int(CGROUP.read_text()))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return total


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
