"""Checks of installed packages, which stop a promotion like the built-in ones.

A package adds a check through an entry point of the group ``nudge.checks``: its name names the
check, its value is a function of the model's folder and its completions that returns one or more
`Outcome` values::

    [project.entry-points."nudge.checks"]
    no_apologies = "my_package:no_apologies"

    def no_apologies(model: Path, completions: Sequence[Completion]) -> list[Outcome]:
        bad = [each.prompt for each in completions if "sorry" in each.text.lower()]
        return [Outcome(not bad, f"{len(bad)} completions apologize: {bad[:3]}")]
"""

from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NamedTuple

from nudge.components.common.artifacts.evaluation import Check
from nudge.components.common.core.errors import UserError
from nudge.components.evaluate.completions import Completion

GROUP = "nudge.checks"


class Outcome(NamedTuple):
    """Whether a check passed, and a sentence for the report about what it found."""

    ok: bool
    message: str


AddedCheck = Callable[[Path, Sequence[Completion]], Iterable[Outcome]]


def load_checks() -> dict[str, AddedCheck]:
    """Every check of an installed package by its name.

    Raises `UserError` if one cannot be loaded: a check that cannot run must not count as passed.
    """
    return {point.name: _loaded(point) for point in entry_points(group=GROUP)}


def added_checks(model: Path, completions: Sequence[Completion]) -> list[Check]:
    """The outcomes of every added check; one that raises has failed, and says what it raised."""
    return [
        Check("package", name, bool(outcome.ok), f"{name}: {outcome.message}")
        for name, check in load_checks().items()
        for outcome in _outcomes(check, model, completions)
    ]


def _loaded(point: EntryPoint) -> AddedCheck:
    package = point.dist.name if point.dist else "a package"
    try:
        check: AddedCheck = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{package} adds the check {point.name} ({point.value}), which cannot be loaded: "
            f"{error}; fix it or uninstall it"
        ) from None
    return check


def _outcomes(
    check: AddedCheck, model: Path, completions: Sequence[Completion]
) -> Iterable[Outcome]:
    try:
        return list(check(model, completions)) or [Outcome(False, "the check has no outcome")]
    except Exception as error:  # noqa: BLE001  a package's code may raise anything
        return [Outcome(False, f"the check raised {type(error).__name__}: {error}")]
