"""The machine that figures were measured on: processor, instruction sets, kernel libraries."""

import os
import platform
from pathlib import Path

import torch

from nudge.kernels import native
from nudge.kernels.cpu_products import onednn_is_faster

INSTRUCTION_SETS = (
    *("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "sve2", "bf16", "i8mm"),
)
"""Those that matter for matrix products, as Linux names them on x86 and arm64."""
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that keep the libraries from instructions that the processor has."""
CPU_INFO = Path("/proc/cpuinfo")


def processor(info: str | None = None) -> str:
    """The processor's name; ``info`` is the text of /proc/cpuinfo, by default this machine's."""
    name = _field(_read() if info is None else info, "model name")
    return name or platform.processor() or platform.machine()


def instruction_sets(info: str | None = None) -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor has; empty if the system does not say."""
    text = _read() if info is None else info
    flags = set((_field(text, "flags") or _field(text, "Features")).split())
    return [name for name in INSTRUCTION_SETS if name in flags]


def cpu_products() -> str:
    """The libraries that multiply matrices on this CPU, and the instructions that they may use."""
    blas = "MKL" if torch.backends.mkl.is_available() else "torch's BLAS"
    single = "oneDNN" if onednn_is_faster() else blas
    half = "oneDNN" if torch.backends.mkldnn.is_available() else blas
    found = f"{single} for float32, {half} for bfloat16 (torch: {_capability()}"
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    return ", ".join([found, *limits]) + ")"


def gpu_kernel(device: int = 0) -> str:
    """What computes the loss on a GPU: the kernel's library, or torch operations and why."""
    if why := native.why_not(device):
        return f"torch operations: {why}"
    library = native.find()
    assert library is not None
    stamp = native.stamp(library)
    return f"{native.NAME} {stamp.get('version', '')}, sources {stamp['sources'][:12]}"


def describe() -> dict[str, str]:
    """The facts that belong beside every figure, by name."""
    facts = {
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "instruction sets": ", ".join(instruction_sets()) or "unknown",
        "kernel library": cpu_products(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name(0)
        facts["kernel library"] = f"GPU: {gpu_kernel()}; CPU: {facts['kernel library']}"
    return facts


def _read() -> str:
    return CPU_INFO.read_text(encoding="utf-8", errors="replace") if CPU_INFO.is_file() else ""


def _field(text: str, name: str) -> str:
    lines = (line for line in text.splitlines() if line.partition(":")[0].strip() == name)
    return next(lines, "").partition(":")[2].strip()


def _capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())
