"""Schedules without a cluster: units that systemd accepts, a line that cron would run, one page."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import nights, schedules
from nudge.pipelines.local.schedules import LocalSchedule, calendar
from tests.pipelines.finished_run import finished_run

FAKES = {
    "systemctl": 'echo "$@" >> "$CALLS"; [ "$2" != is-system-running ] || echo "$SYSTEMD"',
    "crontab": '[ "$1" = - ] && cat > "$TAB" || cat "$TAB" 2>/dev/null',
}
"""Stand-ins for programs that need a user session. They record how they are called; their answers
follow the manual pages, and no real one was compared with them."""


def nudge(*arguments: object, status: int = 0, text: str = "") -> Result:
    command = [str(each) for each in arguments]
    done = CliRunner().invoke(main, command, input=text, catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a schedule's file and, first on PATH, stand-ins that keep their input there."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("TAB", str(tmp_path / "tab"))
    monkeypatch.setenv("SYSTEMD", "running")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "my 100% home"))
    for name in ("NUDGE_PIPELINES_URL", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text('name: nightly\nrecipe: eiffel\ncron: "0 30 2 * * mon-fri"\n')
    return tmp_path


needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 30 2 * * *", "*-*-* 02:30:00"),
        ("0 30 2 * * mon-fri", "Mon..Fri *-*-* 02:30:00"),
        ("0 0 */2 * * 0,6", "Sun,Sat *-*-* 00/2:00:00"),
        ("15 0 4 1,15 jan-mar ?", "*-1..3-1,15 04:00:15"),
        ("0 5-10/2 * */2 * *", "*-*-01/2 *:05..10/2:00"),
    ],
)
def test_a_cron_becomes_a_calendar_that_systemd_reads(cron: str, expected: str) -> None:
    assert calendar(cron) == expected
    if analyze := shutil.which("systemd-analyze"):
        done = subprocess.run([analyze, "calendar", expected], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_what_systemd_cannot_express_is_refused() -> None:
    with pytest.raises(UserError, match="set one of the two to"):
        calendar("0 0 2 1 * mon")


@needs_systemd
def test_systemd_accepts_the_units_and_a_wrong_one_is_noticed(tmp_path: Path) -> None:
    """By ``systemd-analyze verify``, with a path that needs quoting."""
    home = tmp_path / 'a "b" 100% $c'
    folder = tmp_path / "d 50% e"
    folder.mkdir()
    for changes in ({"cron": "0 30 2 * * 1-5"}, {"interval_minutes": 90}):
        made = LocalSchedule("nightly", "r.yaml", str(folder), "systemd", **changes)
        texts = schedules.units(home, made)
        schedules.check_units(texts)
    broken = {name: text.replace("Type=oneshot", "Type=never") for name, text in texts.items()}
    with pytest.raises(UserError, match="systemd refuses the schedule"):
        schedules.check_units(broken)


def test_apply_asks_first_and_delete_removes_everything(machine: Path) -> None:
    folder = machine / "config" / "systemd" / "user"
    asked = nudge("schedule", "apply", "s.yaml", text="n\n")
    assert "nothing was changed" in asked.stdout
    assert "OnCalendar=Mon..Fri *-*-* 02:30:00" in asked.stdout
    assert not folder.exists()
    assert not (machine / "my 100% home" / "schedules").exists()
    assert "nightly created" in nudge("schedule", "apply", "s.yaml", text="y\n").stdout
    assert {path.name for path in folder.iterdir()} == {
        "nudge-nightly.service",
        "nudge-nightly.timer",
    }
    assert "nightly unchanged" in nudge("schedule", "apply", "s.yaml", "--yes").stdout
    assert "enable --now nudge-nightly.timer" in (machine / "calls").read_text()
    listed = nudge("schedule", "list").stdout
    assert "nightly" in listed
    assert "enabled" in listed
    nudge("schedule", "pause", "nightly")
    assert "paused" in nudge("schedule", "list").stdout
    nudge("schedule", "delete", "nightly")
    assert list(folder.iterdir()) == []
    assert "disable --now nudge-nightly.timer" in (machine / "calls").read_text()
    assert "there is no schedule" in nudge("schedule", "list").stdout
    gone = nudge("schedule", "delete", "nightly", status=2)
    assert "has no schedule 'nightly'" in gone.stderr


def test_without_systemd_it_is_a_line_of_cron_that_a_shell_can_run(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYSTEMD", "offline")
    (machine / "tab").write_text("0 1 * * * mine\n")
    nudge("schedule", "apply", "s.yaml", "--yes")
    nudge("schedule", "apply", "s.yaml", "--yes")
    mine, line = (machine / "tab").read_text().splitlines()
    assert mine == "0 1 * * * mine"
    assert line.startswith("30 2 * * mon-fri cd ")
    # cron passes what follows the five fields to sh, with \% as a percent sign.
    command = line.split(" ", 5)[5].replace("\\%", "%")
    program = machine / "programs" / "nudge"
    program.write_text('#!/bin/sh\necho "$NUDGE_HOME|$TOKEN|$PWD|$@"\n')
    program.chmod(0o755)
    command = command.replace(shlex.quote(str(Path(sys.executable).parent / "nudge")), "nudge")
    home = machine / "my 100% home"
    (home / "schedules" / "nightly.env").write_text("TOKEN='a b'\n")
    done = subprocess.run(["sh", "-c", command], cwd="/", env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0
    said = (home / "schedules" / "nightly.log").read_text()
    assert said == f"{home}|a b|{machine}|schedule night nightly\n"
    nudge("schedule", "delete", "nightly")
    assert (machine / "tab").read_text() == "0 1 * * * mine\n"


def test_with_neither_it_says_what_to_install(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYSTEMD", "offline")
    (machine / "programs" / "crontab").unlink()
    monkeypatch.setenv("PATH", str(machine / "programs"))
    refused = nudge("schedule", "apply", "s.yaml", "--yes", status=2)
    assert "install cron" in refused.stderr


def test_a_night_is_noted_on_one_page_whatever_became_of_it(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = machine / "my 100% home"
    monkeypatch.setenv("NUDGE_HOME", str(home))
    nudge("schedule", "apply", "s.yaml", "--yes")

    def ended(*_: object, **__: object) -> object:
        run = finished_run(home)
        run.lock = open(os.devnull)  # noqa: SIM115 - the command closes it
        return run

    monkeypatch.setattr("nudge.pipelines.cli.run.execute", ended)
    done = nudge("schedule", "night", "nightly")
    assert json.loads(done.stdout)["state"] == "promoted"

    def refused(*_: object, **__: object) -> object:
        raise UserError("the store <is> down")

    monkeypatch.setattr("nudge.pipelines.cli.run.execute", refused)
    nudge("schedule", "night", "nightly", status=2)
    page = (home / "schedules" / nights.PAGE).read_text()
    assert "the store &lt;is&gt; down" in page
    assert "1 refused, 1 promoted" in page
    (run,) = (home / "runs").iterdir()
    assert f'href="../runs/{run.name}/index.html"' in page
    with schedules.one_at_a_time(home, "nightly") as free:
        assert free
        left_out = nudge("schedule", "night", "nightly")
        assert "still active" in left_out.stderr


def test_cron_refuses_an_interval_that_it_cannot_count() -> None:
    with pytest.raises(UserError, match="divide an hour"):
        schedules.cron_line(Path("/h"), LocalSchedule("n", "r", "/", "cron", interval_minutes=7))
    line = schedules.cron_line(
        Path("/h"), LocalSchedule("n", "r", "/", "cron", interval_minutes=120)
    )
    assert line.startswith("0 */2 * * * ")
