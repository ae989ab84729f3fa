"""What `nudge clean` removes: what the rules no longer keep, and never what is in use.

Never removed: active runs, the runs and files of versions that are served, and everything in the
object store and the registry, to which a rollback returns. Freed bytes are exact: a file counts
once all of its hard links are removed.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_yaml
from nudge.components.common.core.say import say
from nudge.components.common.core.settings import parse, settings
from nudge.components.common.local.processes import locked, read_record
from nudge.components.common.local.state_file import damaged
from nudge.components.deploy.local import gateway
from nudge.components.deploy.local.local_serving import service_name
from nudge.pipelines.local import tracing
from nudge.pipelines.local.run import is_locked

FILE = "retention.yaml"
"""The rules of a home, if they differ from the defaults."""
ARTIFACTS = "artifacts of a run"
DAY_S = 86400.0
LEFTOVER_S = DAY_S
"""The age from which an unfinished `.part-` folder belongs to a process that was killed."""


@settings
class Rules:
    """How much of each kind is kept. What is newer than ``days``, or among the newest of its kind,
    stays."""

    days: Annotated[float, Field(ge=0)] = 14
    """Artifacts of runs (models, corpora), reusable steps, base models and compiled kernels that
    were used within this many days are kept."""
    history_days: Annotated[float, Field(ge=0)] = 365
    """The rest of a run (its result, pages, recipe and log) is kept this long."""
    runs: Annotated[int, Field(ge=0)] = 10
    """The newest runs that are kept whatever their age."""
    reuse: Annotated[int, Field(ge=0)] = 10
    """The newest results that are kept for each step, for reuse, whatever their age."""
    serving: Annotated[int, Field(ge=0)] = 1
    """Versions per model, besides those in use, whose files stay ready for a rollback."""
    checkpoints_days: Annotated[float, Field(ge=0)] = 7
    """Checkpoints of trainings that did not end are kept this long."""
    max_gigabytes: Annotated[float, Field(ge=0)] = 0
    """If more than this is used, runs and reusable steps are removed, oldest first, until it fits
    or none is left that may go; 0 means no limit."""


@dataclass(frozen=True)
class Removal:
    """One folder or file to remove; ``bytes`` is its size and ``frees`` what its removal, together
    with all others of the plan, gives back."""

    kind: str
    path: Path
    why: str
    bytes: int = 0
    frees: int = 0


@dataclass(frozen=True)
class Plan:
    """What to remove, and how much the home uses now."""

    removals: tuple[Removal, ...]
    used: int

    @property
    def frees(self) -> int:
        """The bytes that all removals free together."""
        return sum(each.frees for each in self.removals)

    def plain(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "used_bytes": self.used,
            "frees_bytes": self.frees,
            "removals": [{**asdict(each), "path": str(each.path)} for each in self.removals],
        }


def rules(home: Path, changes: dict[str, Any] | None = None) -> Rules:
    """The rules of a home, with ``changes`` that take precedence; raises `UserError`."""
    path = home / FILE
    values: Any = {}
    if path.is_file():
        remedy = "correct it, or delete it to use the defaults (`nudge clean --help` has them)"
        try:
            values = read_yaml(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise damaged(path, " ".join(str(error).split()), remedy) from None
        if not isinstance(values, dict):
            raise damaged(path, "it is not a mapping of rules", remedy)
        try:
            parse(Rules, values, "retention")
        except UserError as error:
            raise UserError(f"{path}: {error}\n{remedy}") from None
    return parse(Rules, {**values, **(changes or {})}, "retention")


def plan(home: Path, wanted: Rules, now: float | None = None) -> Plan:
    """What the rules remove; changes nothing."""
    now = time.time() if now is None else now
    links = _links(home)
    found = [*_runs(home, wanted, now), *_serving(home, wanted), *_leftovers(home, now)]
    for base in (home, home / "containers"):  # what steps in containers keep is in the second one
        found += [
            *_reuse(base, wanted, now),
            *_aged(base / "checkpoints", "checkpoints", wanted.checkpoints_days, now),
            *_aged(base / "base_models", "base model", wanted.days, now),
            *_aged(base / "torchinductor", "compiled kernel", wanted.days, now),
        ]
    used = sum(size for size, _ in links.values())
    if wanted.max_gigabytes:
        found += _over(home, wanted, found, used, links)
    return Plan(_freed(found, links), used)


def apply(home: Path, wanted: Rules) -> Plan:
    """Remove what the rules no longer keep; returns what was removed.

    Locks keep runs from beginning and traffic from moving until it ends. What cannot be removed
    is left.
    """
    with locked(home, "runs"), locked(home, "up"):
        made = plan(home, wanted)
        done = []
        for each in made.removals:
            gone = each.path.with_name(f".{each.path.name.lstrip('.')}.deleted")
            if each.kind == ARTIFACTS and not _remembered(each.path.parent):
                continue
            with contextlib.suppress(OSError):
                each.path.rename(gone)  # never seen half deleted
                shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
                done.append(each)
        return Plan(tuple(done), made.used)


def _remembered(folder: Path) -> bool:
    """Whether what `nudge trace` needs of a run is kept before its artifacts go."""
    try:
        tracing.keep_fingerprints(folder)
        tracing.keep_lineage(folder)
    except (UserError, OSError) as error:
        say(f"{folder.name} keeps its artifacts: {error}")
        return False
    return True


def in_use(home: Path) -> set[tuple[str, str]]:
    """The versions, as (model, version), that have traffic or a running server here, and the one of
    each model that a rollback returns to."""
    used = {
        (model, version)
        for model, route in gateway.routes(home).items()
        for version in route.shares
    }
    for folder in (home / "serving").glob("*/*"):
        record = read_record(home, service_name(folder.parent.name, folder.name))
        if record and record.process():
            used.add((folder.parent.name, folder.name))
    return used


def _runs(home: Path, wanted: Rules, now: float) -> Iterator[Removal]:
    """Old runs, without those that made a version in use: first their artifacts, later the rest."""
    versions = {version for _, version in in_use(home)}
    folders = sorted(
        (path for path in (home / "runs").glob("[!.]*") if path.is_dir()), reverse=True
    )
    for folder in folders[wanted.runs :]:
        lock = folder / "lock"
        if folder.name in versions or (lock.is_file() and is_locked(lock)):
            continue
        age, artifacts = _age(folder, now), folder / "artifacts"
        why = f"{age:.0f} days old and not among the newest {wanted.runs}"
        if age > wanted.history_days:
            yield Removal("run", folder, why)
        elif age > wanted.days and artifacts.is_dir():
            yield Removal(ARTIFACTS, artifacts, why)


def _reuse(home: Path, wanted: Rules, now: float) -> Iterator[Removal]:
    for step in (home / "reuse").glob("*"):
        kept = [path for path in step.glob("[!.]*") if path.is_dir()]
        for path in sorted(kept, key=_time, reverse=True)[wanted.reuse :]:
            if (age := _age(path, now)) > wanted.days:
                yield Removal("reuse", path, f"not used for {age:.0f} days")


def _serving(home: Path, wanted: Rules) -> Iterator[Removal]:
    used = in_use(home)
    for model in (home / "serving").glob("[!.]*"):
        idle = [
            path
            for path in model.glob("[!.]*")
            if path.is_dir() and (model.name, path.name) not in used
        ]
        for path in sorted(idle, key=_time, reverse=True)[wanted.serving :]:
            yield Removal("serving", path, "not served; the object store has it")


def _aged(folder: Path, kind: str, days: float, now: float) -> Iterator[Removal]:
    """What no process has touched for ``days``."""
    for path in folder.glob("[!.]*"):
        if (age := _age(path, now)) > days:
            yield Removal(kind, path, f"not used for {age:.0f} days")


def _leftovers(home: Path, now: float) -> Iterator[Removal]:
    """What a killed process left half written, or half deleted."""
    for pattern in ("*/.*.part-*", "*/*/.*.part-*", "*/.*.deleted", "*/*/.*.deleted"):
        for path in home.glob(pattern):
            if now - _time(path) > LEFTOVER_S and "object-store" not in path.parts:
                yield Removal("leftover", path, "left by a process that was killed")


def _over(
    home: Path,
    wanted: Rules,
    found: list[Removal],
    used: int,
    links: dict[int, tuple[int, list[Path]]],
) -> Iterator[Removal]:
    """Further runs and reusable steps, oldest first, until the home is small enough."""
    limit = wanted.max_gigabytes * 1e9
    known = {each.path for each in found}
    none_kept = Rules(days=0, runs=1, reuse=0)
    now = time.time() + 1
    more = [*_runs(home, none_kept, now), *_reuse(home, none_kept, now)]
    more = sorted((each for each in more if each.path not in known), key=lambda e: _time(e.path))
    chosen: list[Removal] = []
    for each in more:
        freed = sum(e.frees for e in _freed([*found, *chosen], links))
        if used - freed <= limit:
            break
        why = f"more than {wanted.max_gigabytes:g} GB is used"
        chosen.append(Removal(each.kind, each.path, why))
    yield from chosen


def _links(home: Path) -> dict[int, tuple[int, list[Path]]]:
    """Every file of a home by inode: its size on the disk, and its paths."""
    found: dict[int, tuple[int, list[Path]]] = {}
    for folder, _, names in os.walk(home):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(OSError):
                status = path.lstat()
                _, paths = found.setdefault(status.st_ino, (status.st_blocks * 512, []))
                paths.append(path)
    return found


def _freed(found: list[Removal], links: dict[int, tuple[int, list[Path]]]) -> tuple[Removal, ...]:
    """The removals with their sizes; a file's bytes are freed by the last removal that has it."""
    order = {each.path: number for number, each in enumerate(found)}
    sizes, frees = [0] * len(found), [0] * len(found)
    for size, paths in links.values():
        owners = [_owner(path, order) for path in paths]
        numbers = {order[owner] for owner in owners if owner}
        for number in numbers:
            sizes[number] += size
        if all(owners):
            frees[max(numbers)] += size
    return tuple(
        Removal(each.kind, each.path, each.why, sizes[number], frees[number])
        for number, each in enumerate(found)
    )


def _owner(path: Path, order: dict[Path, int]) -> Path | None:
    return next((each for each in (path, *path.parents) if each in order), None)


def _time(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()


def _age(path: Path, now: float) -> float:
    return (now - _time(path)) / DAY_S
