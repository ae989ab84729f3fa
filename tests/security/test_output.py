"""What names, logs and other programs write reaches no terminal as it is, wherever it is shown."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nudge.components.common.core import progress
from nudge.components.common.core.say import say
from nudge.pipelines.cli.output import echo, echo_json

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b]0;owned\x07\x1b[2J\u202egpj.exe\x9b31m\r\x7f"
"""Sets the title, clears the screen, turns the text around, and overwrites the line."""
ACTING = "\x1b\x07\u202e\x9b\r\x7f"
OUTPUT = {"components/common/core/say.py", "pipelines/cli/output.py"}
"""The modules with the output functions."""


def writes(tree: ast.AST) -> list[int]:
    """The lines that write to stdout or stderr by other means than the output functions."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        file = {each.arg: ast.unparse(each.value) for each in node.keywords}.get("file", "stdout")
        if name == "print" and file.removeprefix("sys.") in ("stdout", "stderr"):
            found.append(node.lineno)
        if name in ("click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"):
            found.append(node.lineno)
        shown = ast.unparse(node.args[0]) if node.args else ""
        plain = not node.args or isinstance(node.args[0], ast.Constant)
        if name in ("click.confirm", "click.prompt") and not (plain or shown.startswith("visible")):
            found.append(node.lineno)
    return found


def test_there_is_one_way_out() -> None:
    for folder in ("components", "pipelines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if name not in OUTPUT:
                assert writes(ast.parse(path.read_text(encoding="utf-8"))) == [], name


@pytest.mark.parametrize(
    "line",
    ["print(name)", "print(name, file=sys.stderr)", "click.echo(name)", "click.confirm(name)"],
)
def test_another_way_out_is_noticed(line: str) -> None:
    assert writes(ast.parse(line)) == [1]
    assert writes(ast.parse("print(name, file=self._file); click.confirm('ok?')")) == []


def test_the_ways_out_let_nothing_through(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    say(ValueError(f"https://user:hunter2@host/{HOSTILE}"), stdout=True)
    echo(HOSTILE)
    echo(HOSTILE, err=True)
    with progress.progress("train", 2, "steps") as bar:
        bar.note(stage=HOSTILE)
    assert not [each for each in ACTING if each in progress.figures({"stage": HOSTILE})]
    echo_json({"name": HOSTILE, "umlaut": "ü"})
    shown = capsys.readouterr()
    for text in shown:
        assert not [each for each in ACTING if each in text]
        assert "a␛]0;owned␇␛[2J[U+202E]gpj.exe[9B]31m␍␡" in text
    assert "hunter2" not in shown.out
    values = shown.out[shown.out.index("{") :]
    assert json.loads(values) == {"name": HOSTILE, "umlaut": "ü"}
    assert "ü" in values


def test_an_unexpected_error_of_a_command_lets_nothing_through(tmp_path: Path) -> None:
    """Python writes the text of an error as it is."""
    program = (
        "import sys; from nudge.pipelines.cli import output; output.write_anything()\n"
        "raise RuntimeError(sys.stdin.read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=HOSTILE.encode(), capture_output=True
    )
    shown = done.stderr.decode()
    assert done.returncode == 1
    assert "gpj.exe" in shown
    assert not [each for each in ACTING if each in shown]
