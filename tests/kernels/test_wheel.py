"""`make wheel` from a clean copy without a network, and the wheel in a clean environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from nudge.kernels import fused_linear_cross_entropy, native

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ALONE = """
import torch
from nudge.kernels import fused_linear_cross_entropy, native

def loaded():
    return native.NAME in open("/proc/self/maps").read()

hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
targets = torch.arange(7)
ours = torch.autograd.grad(fused_linear_cross_entropy(hidden, weight, targets), (hidden, weight))
eager = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
for mine, theirs in zip(ours, torch.autograd.grad(eager, (hidden, weight))):
    torch.testing.assert_close(mine, theirs)
assert not loaded()  # the CPU path does not need it
assert native.load() is None, native.load()
assert loaded()
print(native.find())
print(native.stamp(native.find()))
print(native.why_not(0))
try:
    native.scale_unless_one(hidden, targets)
except NotImplementedError as error:
    print(error)
"""


def test_a_missing_library_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "HERE", tmp_path)
    native.load.cache_clear()
    try:
        assert native.load() == (
            "libnudge_kernels.so is not built: install the wheel that `make wheel` builds, or run "
            "`make wheel` here"
        )
        (tmp_path / native.NAME).write_bytes(b"no library")
        native.load.cache_clear()
        assert f"does not load on torch {torch.__version__}" in str(native.load())
        loss = fused_linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.arange(2))
        assert loss.isfinite()
    finally:
        native.load.cache_clear()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy of only the kernels, without a network."""
    if NVCC is None:
        pytest.skip("no nvcc on PATH or in /usr/local/cuda: the wheel cannot be built here")
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=ignored)
    shutil.copy(ROOT / "Makefile", copy)
    cut_off = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut_off, "true"], capture_output=True).returncode:
        print("unshare --net is not permitted here, so the build could reach the network")
        cut_off = []
    done = subprocess.run(
        [*cut_off, "make", "wheel", f"WHEEL_PYTHON={sys.executable}"],
        cwd=copy, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (copy / "dist").iterdir()
    return made


def installed(wheel: Path, folder: Path) -> list[str]:
    """Install the wheel in a fresh virtual environment; return the command of its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index",
         "--no-deps", str(wheel)], check=True,
    )  # fmt: skip
    return [python]


def run(python: list[str], script: str) -> str:
    # Python ignores .pth files in folders on PYTHONPATH, so this checkout stays invisible.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(
        [*python, "-c", script], env=environment, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_the_wheel_works_alone_on_this_torch(wheel: Path, tmp_path: Path) -> None:
    python = installed(wheel, tmp_path / "clean")
    found, stamp, why_not, refused = run(python, ALONE).split("\n", 3)
    assert found.startswith(str(tmp_path / "clean"))
    assert native.sources_digest() in stamp
    assert "'architectures': 'sm_80,sm_90,compute_90'" in stamp
    if torch.version.cuda is None:
        assert why_not.startswith("the kernel cannot run on cuda:0 (torch ")
        assert why_not.endswith("this torch was built without CUDA")
    assert "'nudge_kernels::scale_unless_one_' with arguments from the 'CPU' backend" in refused

    changed = Path(found).parent / "csrc" / "plan.cuh"
    changed.write_text(changed.read_text() + "\n")
    check = "from nudge.kernels import native; print(native.load())"
    assert "was built from other sources than" in run(python, check)


@pytest.mark.long
def test_only_one_distribution_owns_the_kernels(tmp_path: Path) -> None:
    """With both distributions installed, uninstalling one must not remove the other's files."""
    copy = tmp_path / "checkout"
    made = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "wheels")
    shutil.copytree(ROOT, copy, ignore=made)
    pip = [sys.executable, "-m", "pip"]
    offline = ["--quiet", "--no-index", "--no-deps"]
    for folder in (".", "./kernels"):
        subprocess.run(
            [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", "dist", folder],
            cwd=copy, check=True,
        )  # fmt: skip
    kernels = copy / "dist" / "nudge_kernels-0.2.0-py3-none-any.whl"
    rest = copy / "dist" / "nudge_lm-0.2.0-py3-none-any.whl"
    python = installed(kernels, tmp_path / "clean")
    within = [*pip, "--python", *python]
    subprocess.run([*within, "install", *offline, str(rest)], check=True)
    imported = "from nudge.kernels import native; print(native.load())"
    assert "is not built" in run(python, f"import nudge.components.common.core.step; {imported}")
    subprocess.run([*within, "uninstall", "--quiet", "--yes", "nudge-lm"], check=True)
    assert "is not built" in run(python, imported)


@pytest.mark.long
def test_the_wheels_tag_files_and_linked_libraries(wheel: Path) -> None:
    assert wheel.name == "nudge_kernels-0.2.0-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(f"nudge/kernels/{native.NAME}")
        names = set(archive.namelist())
    assert {"nudge/kernels/csrc/softmax_loss.cuh", "nudge/kernels/native.py"} <= names
    assert "nudge/kernels/setup.py" not in names
    # The weak reference to the stream of a CUDA torch resolves through libtorch. Without it, every
    # launch would report that torch was built without CUDA.
    assert b"\0libtorch.so\0" in library
    assert b"\0aoti_torch_get_current_cuda_stream\0" in library
    for bound in (b"\0libcudart.so", b"\0libcublas.so", b"\0libpython", b"\0Py_", b"\0_Py"):
        assert bound not in library
