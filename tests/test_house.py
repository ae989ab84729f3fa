"""Imports go one way: pipelines -> components -> kernels, no step imports another step, and inside
`pipelines/` commands import the ways to run a pipeline, and those import the pipelines.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("components", "pipelines", "kernels")
LAYERS = (
    ("steps", "step_state"),
    ("recipes", "placement"),
    (
        *("retrain", "train_and_serve", "distributed_training", "evaluate_only"),
        *("deploy_approved", "rollback"),
    ),
    ("compile", "disconnected", "settings_reference"),
    ("local", "cluster", "plan"),
    ("gpu_check",),
    ("cli",),
    ("api",),
)
"""The modules and folders of `pipelines/`, from the lowest layer to the highest: a module imports
from its own group or from lower layers. `local` and `cluster` do not know each other."""

APART = ("local", "cluster")


def imported(source: str) -> Iterator[tuple[str, bool]]:
    """Every module that a source imports, anywhere in it, and whether the import is at its top."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            # `from nudge.components import train` names a module in its second half.
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


def allowed(path: Path) -> tuple[str, ...]:
    """The prefixes of the nudge modules that a file may import."""
    folder, *rest = path.parts
    if folder == "pipelines":
        return ("nudge.",)
    if folder == "kernels":
        return ("nudge.kernels.",)
    common = ("nudge.components.common.", "nudge.kernels.")
    return common if rest[0] == "common" else (f"nudge.components.{rest[0]}.", *common)


def layer(name: str) -> int:
    """The layer of a module of `pipelines/`, by its name below it."""
    return next(number for number, group in enumerate(LAYERS) if name in group)


def upward(path: Path, name: str) -> bool:
    """Whether a file of `pipelines/` imports a module of a higher layer, or across `APART`."""
    target = name.removeprefix("nudge.pipelines.").partition(".")[0]
    own = path.parts[1].removesuffix(".py")
    if own in APART and target in APART:
        return own != target
    return layer(target) > layer(own)


def faults(path: Path, source: str) -> list[str]:
    found = []
    for name, top in imported(source):
        first = name.partition(".")[0]
        if first in FOLDERS:
            found.append(f"{path} imports {name}; its name is nudge.{name}")
        if first == "nudge" and not f"{name}.".startswith(allowed(path)):
            found.append(f"{path} imports {name}")
        known = ("kfp.", "typing.", "nudge.components.common.core.images.")
        if path.name == "component.py" and top and not f"{name}.".startswith(known):
            found.append(f"{path} imports {name} at its top; a face imports in its body")
        inside = path.parts[0] == "pipelines" and name.startswith("nudge.pipelines.")
        if inside and upward(path, name):
            found.append(f"{path} imports {name}, which is in a higher layer")
    return found


def sources() -> dict[Path, str]:
    """The text of every source file by its path in the repository."""
    files = [each for folder in FOLDERS for each in sorted((ROOT / folder).rglob("*.py"))]
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in files}
    return {path: text for path, text in texts.items() if "build" not in path.parts}


def test_imports_go_one_way() -> None:
    files = sources()
    assert len(files) > 80
    assert [fault for path, text in files.items() for fault in faults(path, text)] == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (
            "components/summary/component.py",
            "def f():\n    from nudge.components import register",
        ),
        ("components/common/core/step.py", "from nudge.components.train.train import train"),
        ("components/train/train.py", "import nudge.pipelines.cli.main"),
        ("kernels/native.py", "from nudge.components import common"),
        ("components/train/train.py", "from kernels import native"),
        ("components/train/component.py", "import torch"),
        ("pipelines/local/serving.py", "from nudge.pipelines.cli import display"),
        ("pipelines/local/services.py", "def f():\n    from nudge.pipelines.cluster import runs"),
        ("pipelines/steps.py", "from nudge.pipelines.recipes import load"),
        ("pipelines/retrain.py", "from nudge.pipelines import compile"),
    ],
)
def test_a_wrong_import_is_noticed(path: str, line: str) -> None:
    assert faults(Path(path), line) != []


def graph(files: dict[Path, str]) -> dict[str, set[str]]:
    """The modules that each module imports, wherever the import is, except for types alone."""
    names = {
        "nudge." + ".".join(path.with_suffix("").parts).removesuffix(".__init__"): text
        for path, text in files.items()
    }
    edges: dict[str, set[str]] = {}
    for module, text in names.items():
        edges[module] = set()
        for name, _ in imported(_without_type_checking(text)):
            target = name if name in names else name.rpartition(".")[0]
            if target in names and target != module:
                edges[module].add(target)
    return edges


def _without_type_checking(text: str) -> str:
    class Removal(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST:
            is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return ast.Pass() if is_typing else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Removal().visit(ast.parse(text))))


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other in a circle (Tarjan's algorithm)."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for target in edges.get(module, ()):
            if target not in numbers:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], numbers[target])
        if lowest[module] == numbers[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in edges:
        if module not in numbers:
            visit(module)
    return found


def test_no_modules_import_each_other() -> None:
    assert cycles(graph(sources())) == []


def test_a_cycle_is_noticed_also_through_an_import_inside_a_function() -> None:
    files = {
        Path("pipelines/a.py"): "from nudge.pipelines import b",
        Path("pipelines/b.py"): "from nudge.pipelines.c import f",
        Path("pipelines/c.py"): "def f():\n    import nudge.pipelines.a",
    }
    assert cycles(graph(files)) == [["nudge.pipelines.a", "nudge.pipelines.b", "nudge.pipelines.c"]]
    only_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nudge.pipelines.a"
    assert cycles(graph({**files, Path("pipelines/c.py"): only_types})) == []


def top_imports(source: str) -> Iterator[str]:
    """The modules that importing a source imports: those outside of its functions."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.expr):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo += ast.iter_child_nodes(node)


def loaded_with(modules: list[str], files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The packages of others that importing modules imports, each with the module that does."""
    todo, seen = list(modules), set()
    while todo:
        name = todo.pop()
        if name in seen or name not in files:
            continue
        seen.add(name)
        todo.append(name.rpartition(".")[0])  # importing a module imports its package
        for each in top_imports(files[name]):
            if each.startswith("nudge."):
                todo += [each, each.rpartition(".")[0]]
            elif (package := each.partition(".")[0]) not in sys.stdlib_module_names:
                yield package, name


def test_commands_and_settings_import_only_what_every_installation_has() -> None:
    """`nudge COMMAND --help` and `nudge settings` work without an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {{"pyyaml": "yaml"}.get(name, name) for name in project["dependencies"]}
    files = {
        "nudge." + ".".join(path.with_suffix("").parts).removesuffix(".__init__"): text
        for path, text in sources().items()
    }
    checked = [
        name
        for name in files
        if name.startswith("nudge.pipelines.cli.") or name.endswith(".settings")
    ]
    assert len(checked) > 20
    found = {each for each in loaded_with(checked, files) if each[0] not in known}
    assert sorted(found) == []
