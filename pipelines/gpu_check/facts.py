"""The facts about the machine that the report begins with."""

import platform
from importlib import metadata
from typing import Any

import torch

from nudge.kernels.machine import describe

PACKAGES = ("transformers", "peft", "bitsandbytes", "triton", "nudge-lm")


def machine(device: str) -> dict[str, Any]:
    """Facts about the device, as strings by name."""
    facts = describe() | {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    if device == "gpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "GPU memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "GPUs": str(torch.cuda.device_count()),
            "CUDA": str(torch.version.cuda),
        }
    return {"facts": facts, "gpu": torch.cuda.is_available()}
