"""The CUDA kernel: finds the compiled library, loads it once, or explains why it cannot.

`make wheel` compiles kernels/csrc into one shared library against torch's stable ABI. In a wheel
it is beside this file, in a checkout in kernels/build. The library also loads on a CPU-only torch,
but the kernel needs a CUDA build of torch 2.11 or newer and compute capability 8.0 or newer.
"""

import ctypes
import functools
import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

NAME = "libnudge_kernels.so"
HERE = Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)
PATHS = {"auto": 0, "two-pass": 1, "one-pass": 2}
"""How rows are read: twice from memory, or once into shared memory; auto chooses by their size."""


def sources_digest() -> str:
    """Hex sha256 over the names and bytes of the sources in kernels/csrc."""
    digest = hashlib.sha256()
    for path in sorted((HERE / "csrc").glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def find() -> Path | None:
    """The path of the compiled library (beside this file in a wheel, in build/ in a checkout)."""
    return next((path for path in (HERE / NAME, HERE / "build" / NAME) if path.is_file()), None)


def _text(library: Path, function: str, *arguments: int) -> str:
    """The text that a C function of the library returns; empty for null."""
    call = getattr(ctypes.CDLL(str(library)), function)
    call.restype = ctypes.c_char_p
    return (call(*arguments) or b"").decode()


def stamp(library: Path) -> dict[str, str]:
    """The build record of a library: version, sources (a sha256), architectures, nvcc."""
    return dict(pair.split("=", 1) for pair in _text(library, "nudge_kernels_stamp").split(";"))


@functools.cache
def load() -> str | None:
    """Load the library, once; return None, or a sentence that explains why it cannot be loaded."""
    library = find()
    if library is None:
        return (
            f"{NAME} is not built: install the wheel that `make wheel` builds, or run `make wheel` "
            "here"
        )
    try:
        torch.ops.load_library(library)
        built_from = stamp(library)["sources"]
    except (OSError, KeyError, AttributeError) as error:
        return f"{library} does not load on torch {torch.__version__}: {error}"
    if built_from != sources_digest():
        return f"{library} was built from other sources than {HERE / 'csrc'}: run `make wheel`"
    return None


@functools.cache
def why_not(device: int) -> str | None:
    """None if the kernel runs on CUDA device ``device``, else a sentence that explains why not."""
    reason = load()
    library = find()
    if reason is not None or library is None:
        return reason
    error = _text(library, "nudge_kernels_why_not", device)
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the kernel needs compute capability 8.0 or newer; cuda:{device} has {found}"
    if error:
        build = stamp(library)
        return (
            f"the kernel cannot run on cuda:{device} (torch {torch.__version__}; built by nvcc "
            f"{build['nvcc']} for {build['architectures']}): {error}"
        )
    return None


@functools.cache
def _can_run(device: int) -> bool:
    reason = why_not(device)
    if reason is not None:
        warnings.warn(
            f"the fused loss uses slower torch operations instead of its kernel: {reason}",
            stacklevel=2,
        )
    return reason is None


def usable(value: Tensor) -> bool:
    """Whether the kernel can process this tensor; warns once per GPU with the reason if not."""
    return value.is_cuda and value.dtype in DTYPES and _can_run(value.device.index)


def softmax_loss(
    logits: Tensor,
    targets: Tensor,
    class_weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_softcap: float,
    losses: Tensor,
    lse: Tensor,
    differentiate: bool,
    path: str = "auto",
) -> None:
    """Fill losses and lse, float32 [m], and turn logits [m, V] + bias into the gradient in place.

    scale is float32, [m] or one element expanded; class_weight and bias are float32 [V]. If
    ``differentiate`` is false, the logits are only read. Raises `RuntimeError` if an argument does
    not fit.
    """
    torch.ops.nudge_kernels.softmax_loss_(
        logits, targets, class_weight, bias, scale, ignore_index, label_smoothing, z_loss,
        logit_softcap, losses, lse, differentiate, PATHS[path],
    )  # fmt: skip


def scale_unless_one(value: Tensor, factor: Tensor) -> None:
    """value *= factor (one float32 element); reads and writes nothing if the factor is 1."""
    torch.ops.nudge_kernels.scale_unless_one_(value, factor)
