"""Checks of an installed package: found by entry point, counted by the gate."""

import sys
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.evaluate.added_checks import added_checks, load_checks
from nudge.components.evaluate.completions import Completion

CODE = """
from nudge.components.evaluate.added_checks import Outcome

def no_apologies(model, completions):
    bad = [each.prompt for each in completions if "sorry" in each.text.lower()]
    return [Outcome(not bad, f"{len(bad)} completions apologize: {bad}")]

def has_card(model, completions):
    return [Outcome((model / "README.md").is_file(), "the model has a card")]

def broken(model, completions):
    return completions[99]

def silent(model, completions):
    return []
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, **checks: str) -> None:
    """Put an installed distribution with entry points on the path."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    points = "".join(f"{check} = {value}\n" for check, value in checks.items())
    (info / "entry_points.txt").write_text(f"[nudge.checks]\n{points}")
    (folder / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != name})


COMPLETIONS = [
    Completion("The sky is", " blue.", [1, 2], True, True),
    Completion("Why?", " Sorry, I cannot", [3, 4], True, True),
]


def test_an_installed_packages_checks_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert added_checks(tmp_path, COMPLETIONS) == []
    install(
        tmp_path / "site", monkeypatch, "house_checks",
        no_apologies="house_checks:no_apologies", has_card="house_checks:has_card",
        broken="house_checks:broken", silent="house_checks:silent",
    )  # fmt: skip
    (tmp_path / "README.md").write_text("a card")
    found = {check.name: check for check in added_checks(tmp_path, COMPLETIONS)}
    assert {name: check.ok for name, check in found.items()} == {
        "no_apologies": False, "has_card": True, "broken": False, "silent": False,
    }  # fmt: skip
    assert "1 completions apologize: ['Why?']" in found["no_apologies"].message
    assert "raised IndexError" in found["broken"].message


def test_a_check_that_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", monkeypatch, "house_checks", gone="house_checks:gone")
    with pytest.raises(UserError, match="house_checks adds the check gone .* uninstall it"):
        load_checks()
