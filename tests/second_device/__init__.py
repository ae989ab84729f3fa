"""A device type of torch, ``second``, in host memory, with a GPU's rules about devices.

A tensor left on the CPU beside one on ``second`` raises, as it does beside CUDA's. `load` builds
the backend with the C++ compiler and registers it; torch holds it until the process ends.
"""

import functools
import shutil
import subprocess
import tempfile
import types
from hashlib import sha256
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "backend.cpp"
KEPT = Path(__file__).parents[2] / ".pytest_cache"
NAME = "second"


def why_not() -> str:
    """Why the device cannot be built here, or nothing."""
    return "" if shutil.which("g++") else "no g++ on PATH"


@functools.cache
def load() -> torch.device:
    """Build and register the device; returns it."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    module = types.ModuleType(NAME)
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    _setup_privateuseone_for_python_backend(NAME, module)
    torch.ops.load_library(_library())
    # Moving a module to PrivateUse1 would else make new parameters, and untie those that are
    # tied; on CUDA they stay the same objects.
    torch.__future__.set_swap_module_params_on_conversion(True)
    return torch.device(NAME, 0)


def _library() -> Path:
    """The built backend; kept beside pytest's own cache, since it takes 20 s of a core."""
    source = SOURCE.read_bytes()
    digest = sha256(source + torch.__version__.encode()).hexdigest()[:16]
    library = KEPT / f"second-device-{digest}.so"
    if library.is_file():
        return library
    home = Path(torch.__file__).parent
    KEPT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        made = Path(folder) / library.name
        subprocess.run(
            [
                "g++", "-std=c++20", "-O0", "-DAT_PER_OPERATOR_HEADERS", "-fPIC", "-shared",
                f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}",
                str(SOURCE), "-o", str(made), f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu",
                "-lc10",
            ],
            check=True,
        )  # fmt: skip
        made.replace(library)
    return library
