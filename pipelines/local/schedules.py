"""Schedules on this machine: a systemd user timer, or a line of cron, that runs a recipe.

A schedule is two files in ``<home>/schedules``: NAME.yaml, the recipe, and NAME.json, when it runs
and what starts it. `nudge schedule night NAME` is what the timer calls.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nudge.components.common.core.errors import UserError, nearest
from nudge.components.common.core.publish import write_atomic
from nudge.components.common.core.say import say
from nudge.components.common.local.state_file import Damaged, read_object

FOLDER = "schedules"
DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("", "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
REMEDY = "apply the schedule's file again: nudge schedule apply FILE"
CRON_MARK = "# nudge schedule"

Kind = Literal["systemd", "cron"]


@dataclass(frozen=True)
class LocalSchedule:
    """A schedule of this machine; ``cron`` has six fields, seconds first, in local time."""

    name: str
    recipe: str
    """The path of its own copy of the recipe."""
    folder: str
    """The directory in which it runs."""
    kind: Kind
    cron: str = ""
    interval_minutes: int = 0
    catch_up: bool = False
    paused: bool = False

    @property
    def unit(self) -> str:
        """The name of its systemd units without their ending."""
        return f"nudge-{self.name}"


def kind_here() -> Kind:
    """What starts programs by the clock here; raises `UserError` if nothing does."""
    if _systemctl("is-system-running", check=False) in ("running", "degraded", "starting"):
        return "systemd"
    if shutil.which("crontab"):
        return "cron"
    raise UserError(
        "nothing on this machine starts programs by the clock for you: no systemd user session "
        "answers and there is no `crontab`; install cron, or start `nudge run RECIPE --clean` with "
        "what you use instead"
    )


def units(home: Path, schedule: LocalSchedule) -> dict[str, str]:
    """The text of a schedule's systemd units, by file name."""
    what = f"[Unit]\nDescription=nudge: {_escaped(schedule.name)}\n"
    when = (
        f"OnCalendar={calendar(schedule.cron)}\nPersistent={str(schedule.catch_up).lower()}"
        if schedule.cron
        else f"OnActiveSec={schedule.interval_minutes}min\n"
        f"OnUnitInactiveSec={schedule.interval_minutes}min"
    )
    command = " ".join(_quoted(word) for word in _command(schedule))
    service = f"""{what}
[Service]
Type=oneshot
WorkingDirectory={_escaped(schedule.folder)}
Environment={_quoted(f"NUDGE_HOME={home}")}
EnvironmentFile=-{_escaped(str(home / FOLDER / f"{schedule.name}.env"))}
ExecStart={command}
# The services and the served model go on after a night.
KillMode=process
Nice=10
"""
    timer = f"{what}\n[Timer]\n{when}\nUnit={schedule.unit}.service\n"
    timer += "\n[Install]\nWantedBy=timers.target\n"
    return {f"{schedule.unit}.service": service, f"{schedule.unit}.timer": timer}


def cron_line(home: Path, schedule: LocalSchedule) -> str:
    """A schedule's line in a crontab."""
    if schedule.cron:
        when = " ".join(schedule.cron.split()[1:]).replace("?", "*")
    else:
        when = _every(schedule.interval_minutes)
    log = home / FOLDER / f"{schedule.name}.log"
    environment = home / FOLDER / f"{schedule.name}.env"
    command = (
        f"cd {shlex.quote(schedule.folder)} && {{ [ ! -f {shlex.quote(str(environment))} ] || "
        f"{{ set -a; . {shlex.quote(str(environment))}; set +a; }}; }} && "
        f"NUDGE_HOME={shlex.quote(str(home))} {shlex.join(_command(schedule))} "
        f">> {shlex.quote(str(log))} 2>&1"
    )
    # In a crontab a percent sign ends the command.
    return f"{when} {command.replace('%', chr(92) + '%')} {CRON_MARK} {schedule.name}"


def _every(minutes: int) -> str:
    if minutes < 60 and 60 % minutes == 0:
        return f"*/{minutes} * * * *"
    if minutes % 60 == 0 and (hours := minutes // 60) <= 24 and 24 % hours == 0:
        return f"0 {'*' if hours == 1 else f'*/{hours}' if hours < 24 else '0'} * * *"
    raise UserError(
        f"interval_minutes = {minutes}: cron can only count in minutes that divide an hour or in "
        "hours that divide a day; choose such a number, or set cron"
    )


def calendar(cron: str) -> str:
    """A cron of six fields as a systemd calendar expression (systemd.time(7)); raises `UserError`
    for what systemd cannot express."""
    seconds, minutes, hours, days, months, weekdays = cron.replace("?", "*").split()
    if days != "*" and weekdays != "*":
        raise UserError(
            f"cron = {cron!r}: cron runs on a day that fits either the day of the month or the "
            "weekday, which systemd cannot express; set one of the two to *"
        )
    date = f"*-{_field(months, MONTHS)}-{_field(days)}"
    time = ":".join(_field(each, two=True) for each in (hours, minutes, seconds))
    day = "" if weekdays == "*" else f"{_weekdays(weekdays)} "
    return f"{day}{date} {time}"


def _field(text: str, names: tuple[str, ...] = (), two: bool = False) -> str:
    parts = []
    for part in text.split(","):
        span, _, step = part.partition("/")
        for number, name in enumerate(names):
            span = re.sub(rf"(?i)\b{name}\b", str(number), span) if name else span
        low, _, high = span.partition("-")
        if low == "*":
            low = ("00" if two else "01") if step else "*"
        low = low.zfill(2) if two and low != "*" else low
        value = f"{low}..{high.zfill(2) if two else high}" if high else low
        parts.append(f"{value}/{step}" if step else value)
    return ",".join(parts)


def _weekdays(text: str) -> str:
    named = re.sub(r"\d", lambda match: DAYS[int(match[0])], text)
    return ",".join(part.title().replace("-", "..") for part in named.split(","))


def check_units(texts: dict[str, str]) -> None:
    """Check systemd units with ``systemd-analyze verify``, where it is installed; raises
    `UserError` with what it says."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in texts]
        for path in paths:
            path.write_text(texts[path.name], encoding="utf-8")
        environment = {"XDG_RUNTIME_DIR": folder, **os.environ}
        done = subprocess.run(
            [program, "verify", "--user", *map(str, paths)],
            capture_output=True,
            text=True,
            env=environment,
        )
    said = [line for line in done.stderr.splitlines() if any(name in line for name in texts)]
    if done.returncode or said:
        raise UserError(f"systemd refuses the schedule: {' '.join(said) or done.stderr.strip()}")


def install(home: Path, schedule: LocalSchedule) -> str:
    """Install or change a schedule, and return ``created``, ``replaced`` or ``unchanged``.

    Raises `UserError` before anything changes if systemd or cron would refuse it.
    """
    path = home / FOLDER / f"{schedule.name}.json"
    text = json.dumps(asdict(schedule), indent=2) + "\n"
    done = "created" if not path.is_file() else "replaced"
    if schedule.kind == "systemd":
        made = units(home, schedule)
        check_units(made)
        folder = unit_folder()
        there = {name: folder / name for name in made}
        same = all(
            file.is_file() and file.read_text() == made[name] for name, file in there.items()
        )
        if same and path.is_file() and path.read_text() == text:
            done = "unchanged"
        for name, file in there.items():
            write_atomic(file, made[name])
        _systemctl("daemon-reload")
        verb = "disable" if schedule.paused else "enable"
        _systemctl(verb, "--now", f"{schedule.unit}.timer")
    else:
        before = crontab()
        lines = [line for line in before if not _is_of(line, schedule.name)]
        after = lines if schedule.paused else [*lines, cron_line(home, schedule)]
        done = "unchanged" if after == before else done
        _write_crontab(after)
    write_atomic(path, text)
    return done


def remove(home: Path, name: str) -> None:
    """Remove a schedule and what starts it; a run that is active goes on."""
    schedule = find(home, name)
    if schedule.kind == "systemd":
        _systemctl("disable", "--now", f"{schedule.unit}.timer", check=False)
        for ending in ("timer", "service"):
            (unit_folder() / f"{schedule.unit}.{ending}").unlink(missing_ok=True)
        _systemctl("daemon-reload", check=False)
    else:
        _write_crontab([line for line in crontab() if not _is_of(line, name)])
    for ending in ("json", "yaml"):
        (home / FOLDER / f"{name}.{ending}").unlink(missing_ok=True)


def find(home: Path, name: str) -> LocalSchedule:
    """The schedule of this name; raises `UserError` if there is none or its file is damaged."""
    path = home / FOLDER / f"{name}.json"
    try:
        values = read_object(path, REMEDY)
        return LocalSchedule(**values)
    except FileNotFoundError:
        names = [each.stem for each in (home / FOLDER).glob("*.json")]
        raise UserError(
            f"{home} has no schedule {name!r}; {nearest(name, names)}"
            + ("" if names else "; create one with `nudge schedule apply FILE`")
        ) from None
    except TypeError:
        raise UserError(f"{path} is of another version of nudge; {REMEDY}") from None


def schedules(home: Path) -> Iterator[LocalSchedule]:
    """The schedules of a home by name; a damaged one is reported on stderr and left out."""
    for path in sorted((home / FOLDER).glob("*.json")):
        try:
            yield find(home, path.stem)
        except (UserError, Damaged) as error:
            say(error)


@contextlib.contextmanager
def one_at_a_time(home: Path, name: str) -> Iterator[bool]:
    """Whether no other run of this schedule is active; none begins during the block if so."""
    path = home / FOLDER / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def unit_folder() -> Path:
    """The folder of this user's systemd units."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "systemd" / "user"


def crontab() -> list[str]:
    """The lines of this user's crontab."""
    done = subprocess.run(["crontab", "-l"], capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def _write_crontab(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(["crontab", "-"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"cron refuses the schedule: {done.stderr.strip()}")


def _is_of(line: str, name: str) -> bool:
    return line.endswith(f"{CRON_MARK} {name}")


def _command(schedule: LocalSchedule) -> list[str]:
    program = Path(sys.executable).parent / "nudge"
    return [str(program), "schedule", "night", schedule.name]


def _systemctl(*arguments: str, check: bool = True) -> str:
    program = shutil.which("systemctl")
    if program is None:
        return ""
    done = subprocess.run([program, "--user", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise UserError(f"systemctl --user {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _escaped(text: str) -> str:
    """A value in a unit file, where a percent sign begins a specifier."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """A word of a command in a unit file."""
    inner = text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{_escaped(inner)}"'
