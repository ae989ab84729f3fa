"""Builds the package; with NUDGE_KERNELS_CUDA=1, which `make wheel` sets, also the CUDA library.

It compiles csrc with nvcc against torch's stable ABI, with no GPU or network. Otherwise nothing is
compiled, so that `pip install ./kernels` works without nvcc and before torch is installed. An
editable installation compiles nothing either; it finds the library in build/ after `make wheel`.

One wheel works with every Python and with every torch 2.11 or newer, including CPU-only builds.
torch's own CUDAExtension builds for one Python and fails on a CPU-only torch, so this file calls
nvcc itself.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
WITH_CUDA = bool(os.environ.get("NUDGE_KERNELS_CUDA"))
"""Compile the library, which needs nvcc and torch. Without it the loss uses torch operations."""
TARGET_TORCH = "0x020b000000000000"  # 2.11: uses nothing newer of torch's stable ABI
ARCHITECTURES = {"sm_80": "compute_80", "sm_90": "compute_90", "compute_90": "compute_90"}
"""Machine code for Ampere (and Ada) and Hopper; PTX, which the driver compiles for newer GPUs."""


def nvcc() -> str:
    """The path of nvcc: from CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda. Exits if not found."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [f"{home}/bin" for home in homes]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit(f"no nvcc in {folders}: install the CUDA toolkit, or set CUDA_HOME to it")
    return found


def torch_folder() -> Path:
    """The folder of the installed torch, whose headers and libraries the build uses."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "torch is not installed, but its headers are needed: install torch 2.11 or newer, for "
            "CPU or CUDA"
        )
    return Path(spec.origin).parent


def compile_library(output: Path, version: str) -> None:
    """Compile the library to ``output``, unless the same command already did."""
    spec = importlib.util.spec_from_file_location("native", HERE / "native.py")
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    sources, torch = native.sources_digest(), torch_folder()
    stamp = {"VERSION": version, "SOURCES": sources, "ARCHITECTURES": ",".join(ARCHITECTURES)}
    command = [
        nvcc(), "-O3", "-std=c++17", "-shared", "--threads", "0",
        *(f"-gencode=arch={arch},code={code}" for code, arch in ARCHITECTURES.items()),
        "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
        *(f'-DNUDGE_{name}="{value}"' for name, value in stamp.items()),
        f"-I{torch / 'include'}", str(HERE / "csrc" / "library.cu"), f"-L{torch / 'lib'}",
        # Nothing refers to libtorch, but the weak reference to CUDA's stream resolves through it.
        # This is one argument because nvcc puts its own -l options after all of -Xlinker.
        "-Xlinker", "--no-as-needed,-ltorch,-ltorch_cpu,-lc10,--as-needed", "-cudart", "static",
    ]  # fmt: skip
    made_by = output.with_suffix(".made-by")
    digest = hashlib.sha256(" ".join(command).encode()).hexdigest()
    if output.is_file() and made_by.is_file() and made_by.read_text() == digest:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    subprocess.run([*command, "-o", str(partial)], check=True)
    partial.replace(output)
    made_by.write_text(digest)


class BuildWithLibrary(build_py):
    """Builds the Python files, csrc and the library, which a checkout caches in build/."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "setup"]

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # remove an earlier build
        super().run()
        if not WITH_CUDA or self.editable_mode:
            return
        name = "libnudge_kernels.so"
        compile_library(HERE / "build" / name, self.distribution.get_version())
        target = Path(self.build_lib) / "nudge" / "kernels" / name
        shutil.copyfile(HERE / "build" / name, target)


class AnyPython(bdist_wheel):
    """Tags the wheel for any Python and this platform: the library uses torch but not Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not WITH_CUDA

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if WITH_CUDA else "any"


class WithLibrary(Distribution):
    """Marks the distribution as not pure Python, so its files go to the platform's folder."""

    def has_ext_modules(self) -> bool:
        return WITH_CUDA


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPython}, distclass=WithLibrary)
