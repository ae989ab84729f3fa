"""Every check by its name, in the order in which they run."""

import importlib
from collections.abc import Sequence

from nudge.components.common.core.errors import UserError, nearest
from nudge.pipelines.gpu_check.checks import Check

MODULES = (
    ("kernel", "CHECKS"), ("training", "CHECKS"), ("speed", "CHECKS"), ("kernel", "SANITIZERS"),
)  # fmt: skip
"""Modules and their checks; the sanitizers come last, because they take longest."""
NAMES = (
    *("kernel-loads", "kernel-calls-float32", "kernel-calls-bfloat16", "kernel-calls-float16"),
    *("kernel-vocabularies", "kernel-offsets", "kernel-options", "kernel-autograd"),
    *("kernel-masked", "kernel-graph"),
    *("train-full-float32", "train-full-bfloat16", "train-lora-float32", "train-lora-bfloat16"),
    *("train-scratch-float32", "train-scratch-bfloat16", "train-lora-int8", "train-lora-nf4"),
    *("train-resume-full", "train-resume-lora", "train-evaluate"),
    *("train-two-ranks-ddp", "train-two-ranks-fsdp"),
    "speed-table",
    *("kernel-memcheck", "kernel-racecheck"),
)
"""The names of all checks, without importing torch."""


def chosen(only: Sequence[str]) -> list[str]:
    """The names that begin with one of ``only``; all without any. Raises `UserError` if one of
    ``only`` begins no name."""
    for each in only:
        if not any(name.startswith(each) for name in NAMES):
            raise UserError(f"no check begins with {each!r}: {nearest(each, NAMES)}")
    return [name for name in NAMES if not only or name.startswith(tuple(only))]


def check_named(name: str) -> Check:
    """The check of this name. Imports its module, which may raise `ImportError`."""
    for module, attribute in MODULES:
        if name.startswith(("train-",) if module == "training" else f"{module}-"):
            found = importlib.import_module(f"nudge.pipelines.gpu_check.{module}")
            for check in getattr(found, attribute):
                if check.name == name:
                    assert isinstance(check, Check)
                    return check
    raise AssertionError(name)
