"""Imports go one way: pipelines -> components -> kernels, and no step imports another step."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("components", "pipelines", "kernels")


def imported(source: str) -> Iterator[tuple[str, bool]]:
    """Every module that a source imports, wherever in it, and whether that is at its top."""
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
    """What of nudge a file may import, by the beginning of its name."""
    folder, *rest = path.parts
    if folder == "pipelines":
        return ("nudge.",)
    if folder == "kernels":
        return ("nudge.kernels.",)
    common = ("nudge.components.common.", "nudge.kernels.")
    return common if rest[0] == "common" else (f"nudge.components.{rest[0]}.", *common)


def faults(path: Path, source: str) -> list[str]:
    told = []
    for name, top in imported(source):
        first = name.partition(".")[0]
        if first in FOLDERS:
            told.append(f"{path} imports {name}; its name is nudge.{name}")
        if first == "nudge" and not f"{name}.".startswith(allowed(path)):
            told.append(f"{path} imports {name}")
        known = ("kfp.", "typing.", "nudge.components.common.core.images.")
        if path.name == "component.py" and top and not f"{name}.".startswith(known):
            told.append(f"{path} imports {name} at its top; a face imports in its body")
    return told


def test_imports_go_one_way() -> None:
    files = [each for folder in FOLDERS for each in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 80
    told = [faults(path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in files]
    assert [fault for each in told for fault in each] == []


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
    ],
)
def test_a_wrong_import_would_be_noticed(path: str, line: str) -> None:
    assert faults(Path(path), line) != []
