"""`pip install .` without extras: each subcommand works or names the extra to install. Each extra
alone installs what its steps or commands import. The kernels install alone, before or after torch.

Environments are made with uv, which installs the same files as pip in a fraction of the time.
"""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from nudge.pipelines.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long

WORKS = (
    *("--version", "recipes", "doctor", "settings", "settings lr", "completion bash"),
    *("recipes --help", "doctor --help"),
)
NEEDS_EXTRAS = (
    "run",
    "run --until ingest",
    "init .",
    "preview",
    "runs",
    "logs",
    "trace v1",
    "clean --dry-run",
    "ask hello",
    "plan eiffel",
    "export v1 made",
    f"verify v1 --key {__file__}",
    "registry copy http://127.0.0.1:1 http://127.0.0.1:2",
    "gpu-check",
    "chat",
    "approve v1",
    "reject v1",
    "run --use-env-services",
    "ingest --json",
    "step ingest --into made",
    "step tokenize --corpus . --into made",
    "step train --tokens . --into made",
    "step evaluate --corpus . --model . --history . --into made",
    "step fetch --model-uri s3://bucket/model --into made",
    "step upload --model . --version v1",
    "step register --model . --evaluation . --uri s3://a --version v1 --run-id r",
    "step deploy --registered-model m --version v1",
    "services up",
    "services status",
    "services down",
    "models --json",
    "promote v1",
    "split v1=100",
    "rollback",
    "register s3://bucket/models/m/v1",
    "compile --into made",
    "upload --url http://127.0.0.1:1",
    "submit --url http://127.0.0.1:1",
    "schedule list --url http://127.0.0.1:1",
    "schedule pause nightly --url http://127.0.0.1:1",
)


STEPS = {
    "data": ("ingest",),
    "train": ("tokenize", "train", "evaluate", "fetch"),
    "release": ("upload", "register", "deploy", "summary"),
}
BASE_MODELS = {"gguf", "huggingface_hub", "safetensors", "torch", "transformers"}
"""What steps import that take a base model; the decorator of every step can reach it."""
REGISTRY_AND_ENERGY = {"mlflow", "pynvml"}
"""MLflow's registry, if its address is set, and the energy of a GPU, if there is one."""
OPTIONAL = {
    "data": {"compression", "ray", "lm_eval", *REGISTRY_AND_ENERGY, *BASE_MODELS},
    "release": {
        *("compression", *REGISTRY_AND_ENERGY, *BASE_MODELS),
        *("cryptography", "cyclonedx", "model_signing"),  # the extra `sign`
    },
    # The readers of guards name the extra `data`, and tasks the extra `tasks`.
    "train": {
        *("compression", "ray", "mlflow", "lm_eval"),
        *("charset_normalizer", "docx", "ijson", "lxml", "mwparserfromhell", "openpyxl", "oxmsg"),
        *("pptx", "py3langid", "pypdfium2", "python_calamine", "striprtf", "trafilatura"),
    },
}
"""What is imported only if a setting asks for it, or where this Python lacks it, by extra."""


def uv(*arguments: str | Path) -> None:
    command = [str(Path(sys.executable).with_name("uv")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels of nudge and of its kernels."""
    folder = tmp_path_factory.mktemp("wheels")
    uv("build", "--wheel", "-o", folder, ROOT)
    uv("build", "--wheel", "-o", folder, ROOT / "kernels")
    return folder


def torch_options(folder: Path) -> list[str | Path]:
    """Options with which uv takes the version of torch that runs here.

    It comes from where pip is configured to find packages, or else from PyTorch's index of CPU
    builds.
    """
    constraint = folder / "constraints.txt"
    constraint.write_text(f"torch=={version('torch')}\n")
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    found = [part for link in links for part in ("--find-links", link)]
    return ["--constraint", constraint, *(found or ["--torch-backend", "cpu"])]


def environment(folder: Path) -> Path:
    """A new, empty environment; returns its Python."""
    uv("venv", "--python", sys.executable, folder)
    return folder / "bin" / "python"


def installation(folder: Path, wheels: Path, extra: str = "") -> Path:
    """A new environment with nudge's wheel and one extra; returns its Python."""
    python = environment(folder)
    (wheel,) = wheels.glob("nudge_lm-*.whl")
    what = f"nudge-lm[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
    options = torch_options(folder)
    uv("pip", "install", "--python", python, "--find-links", wheels, *options, what)
    return python


@pytest.fixture(scope="module")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with nudge's wheel and its base dependencies; gives the command."""
    folder = tmp_path_factory.mktemp("install") / "venv"
    return installation(folder, wheels).with_name("nudge")


def run(command: Path, arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    dropped = ("VIRTUAL_ENV", "PYTHONPATH", "AWS_S3_ENDPOINT", "NUDGE_REGISTRY_URL")
    environment = {name: each for name, each in os.environ.items() if name not in dropped}
    environment["NUDGE_HOME"] = str(folder / "home")
    return subprocess.run(
        [str(command), *arguments.split()],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_subcommand_has_help_without_any_extra(installed: Path, tmp_path: Path) -> None:
    for name in COMMANDS:
        done = run(installed, f"{name} --help", tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_every_subcommand_is_tried_here() -> None:
    assert {each.split()[0] for each in (*WORKS, *NEEDS_EXTRAS)} == {"--version", *COMMANDS}


def test_what_needs_no_extra_works(installed: Path, tmp_path: Path) -> None:
    for arguments in WORKS:
        done = run(installed, arguments, tmp_path)
        assert "Traceback" not in done.stderr, arguments
        assert done.stdout, arguments
        assert done.returncode == (1 if arguments == "doctor" else 0), arguments


def test_what_needs_an_extra_names_it(installed: Path, tmp_path: Path) -> None:
    for arguments in NEEDS_EXTRAS:
        done = run(installed, arguments, tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr, arguments
        assert "pip install 'nudge-lm[" in done.stderr, (arguments, done.stderr)


def imported_by(steps: tuple[str, ...]) -> dict[str, set[str]]:
    """The packages that the steps import, also inside functions, and which modules do."""
    todo = [
        "nudge." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for step in steps
        for path in (ROOT / "components" / step).rglob("*.py")
        if path.name != "component.py"
    ]
    seen: set[str] = set()
    found: dict[str, set[str]] = {}
    while todo:
        module = todo.pop()
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        path = path if path.is_file() else path.with_suffix("") / "__init__.py"
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name.startswith("nudge."):
                todo += [name, name.rpartition(".")[0]]
            else:
                found.setdefault(name.partition(".")[0], set()).add(module)
    known = {"nudge", *sys.stdlib_module_names}
    return {name: modules for name, modules in found.items() if name not in known}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield from imports(node)


@pytest.mark.parametrize("extra", sorted(STEPS))
def test_each_extra_alone_installs_what_its_steps_import(
    extra: str, wheels: Path, tmp_path: Path
) -> None:
    python = installation(tmp_path / "venv", wheels, extra)
    needed = imported_by(STEPS[extra])
    code = "import importlib.util, sys\nfor name in sys.argv[1:]:\n"
    code += "    if importlib.util.find_spec(name) is None: print(name)"
    names = sorted(needed.keys() - OPTIONAL[extra] - {"kfp"})
    done = subprocess.run(
        [str(python), "-c", code, *names], capture_output=True, text=True, timeout=120, check=True
    )
    assert {name: needed[name] for name in done.stdout.split()} == {}
    # The module of each step is imported, too: its top may need what is only optional elsewhere.
    for step in STEPS[extra]:
        for module in (f"nudge.components.{step}.{step}", f"nudge.components.{step}.settings"):
            if importlib.util.find_spec(module) is None:
                continue  # fetch and others have no settings
            done = subprocess.run(
                [str(python), "-c", f"import {module}"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr


def test_the_extra_pipeline_alone_compiles(wheels: Path, tmp_path: Path) -> None:
    command = installation(tmp_path / "venv", wheels, "pipeline").with_name("nudge")
    done = run(command, "compile --into made", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "train_and_serve.yaml").is_file()


def test_the_extra_local_alone_runs_the_services(wheels: Path, tmp_path: Path) -> None:
    command = installation(tmp_path / "venv", wheels, "local").with_name("nudge")
    try:
        for arguments in ("services up", "services status", "models --json"):
            done = run(command, arguments, tmp_path)
            assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    finally:
        done = run(command, "services down", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", [(), ("torch",)], ids=["without torch", "with torch"])
def test_the_kernels_install_alone(first: tuple[str, ...], tmp_path: Path) -> None:
    """As `pip install ./kernels` does: in an isolated build, which sees no torch."""
    python, options = environment(tmp_path / "venv"), torch_options(tmp_path)
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    copy = shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignored)
    for what in (*first, str(copy)):
        uv("pip", "install", "--python", python, *options, what)
    code = (
        "import torch\n"
        "from nudge.kernels import fused_linear_cross_entropy as loss\n"
        "print(loss(torch.ones(2, 3), torch.ones(4, 3), torch.arange(2)).item())"
    )
    done = subprocess.run(
        [str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1.3863, abs=1e-4)  # ln 4
