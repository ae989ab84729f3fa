"""Shown texts contain no credentials and nothing that acts on a terminal or a page."""

import io
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from rich.table import Table
from rich.text import Text

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sanitize import masked, visible
from nudge.pipelines.cli.screen import Screen
from tests.nights import NUDGE

SECRET = "hunter2"
HERE = "127.0.0.1:9"
PRESIGNED = f"https://b.s3.example.com/text.jsonl?X-Amz-Credential=a&X-Amz-Signature={SECRET}"
ATTACK = "a\x1b]0;owned\x07\x1b[2Jb\u202etxt.exe\x9b31m"
ACTING = ("\x1b", "\x07", "\u202e", "\x9b")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://user:{SECRET}@host/x.csv", "https://***@host/x.csv"),
        (f"s3://key:{SECRET}@bucket/x: no such key", "s3://***@bucket/x: no such key"),
        (f"'https://{SECRET}@host/x', asked", "'https://***@host/x', asked"),
        (PRESIGNED, "https://b.s3.example.com/text.jsonl?***"),
        (f"{PRESIGNED} {PRESIGNED}.", "https://b.s3.example.com/text.jsonl?*** " * 2),
        ("https://host/a.csv, file:///a/b?c#d, me@example.com", None),
        ("hf://org/model@main and s3://bucket/a@b?else=c", None),
    ],
)  # fmt: skip
def test_credentials_of_uris_are_masked(text: str, shown: str | None) -> None:
    assert masked(text) == (text if shown is None else shown.strip())
    assert str(UserError(text)) == masked(text)


def test_characters_that_act_on_a_terminal_are_made_visible() -> None:
    assert visible("a\nb\tc é 日本") == "a\nb\tc é 日本"
    assert not any(char in visible(ATTACK) for char in ACTING)
    assert not any(char in str(UserError(ATTACK)) for char in ACTING)
    output = io.StringIO()
    table = Table(title=ATTACK)
    table.add_column(ATTACK)
    table.add_row(Text(ATTACK))
    screen = Screen(file=output, width=200)
    screen.print(table)
    screen.print(ATTACK, markup=False)
    assert "[U+202E]" in output.getvalue()
    assert not any(char in output.getvalue() for char in ACTING)


@pytest.mark.long
def test_a_run_shows_no_credential_of_its_data_uri(tmp_path: Path) -> None:
    """Not on the terminal, and not in the log, the events, the result or the pages of a run."""
    uris = [
        f"https://user:{SECRET}@127.0.0.1:9/x.jsonl",
        PRESIGNED.replace("b.s3.example.com", HERE),
    ]
    recipe = {
        "name": "r",
        "model_name": "r",
        "base_model": str(tmp_path / "none"),
        "ingest": {"data_uri": " ".join(uris)},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "NUDGE_HOME": str(tmp_path / "home")}
    command = [NUDGE, "run", str(tmp_path / "r.yaml")]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    finally:
        subprocess.run([NUDGE, "services", "down"], env=environment, capture_output=True)
    assert done.returncode == 1, done.stderr
    assert HERE in done.stderr
    assert SECRET not in done.stdout + done.stderr
    (run,) = (tmp_path / "home" / "runs").iterdir()
    found = [
        str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert found == ["recipe.yaml"]  # the user's own file
