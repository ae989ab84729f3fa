"""A run is followed, and ended with all that it started; the engine is a script that plays one."""

import json
import sys
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest

from nudge.components.common.local import processes
from nudge.pipelines.local import following as follow_module
from nudge.pipelines.local.following import follow
from nudge.pipelines.local.run import Run, begin
from nudge.pipelines.recipes import load

TELL = """
import json, os, signal, subprocess, sys, time

def tell(step, event, **values):
    line = {"time": time.time(), "step": step, "event": event, **values}
    with open(os.environ["NUDGE_EVENTS"], "a") as file:
        print(json.dumps(line), file=file, flush=True)

def end(step, status, **outputs):
    tell(step, "step_end", status=status, seconds=1.0, outputs=outputs, results={})
"""
ONE = """
tell("ingest", "step_start")
end("ingest", "done")
tell("train", "step_start")
if TRAINS:
    tell("train", "start", done=0, total=9, unit="steps", fields={})
    time.sleep(2)
end("train", "done" if TRAINS else "reused", model=MODEL)
time.sleep(2)
tell("upload", "step_start")
end("upload", "done")
"""
STEP = """
import os, signal, sys, time

def stop(*_):
    time.sleep(float(sys.argv[1]))
    with open(sys.argv[2], "w") as file:
        file.write("a checkpoint")
    os._exit(1)

signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
time.sleep(600)
"""
TWO = f"""
step = subprocess.Popen([sys.executable, "-c", {STEP!r}, *ARGUMENTS], stdout=subprocess.PIPE)
step.stdout.readline()
tell("train", "step_start")
tell("train", "start", done=0, total=step.pid, unit="steps", fields={{}})
step.wait()
"""


def engine(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> None:
    script = folder / "engine"
    script.write_text(f"#!{sys.executable}\n{TELL}{program}")
    script.chmod(0o755)
    monkeypatch.setattr(follow_module.sys, "executable", str(script))  # type: ignore[attr-defined]


def cut_off(home: Path) -> str:
    """A run of some night that was cut off when its model was uploaded; returns its id."""
    run = begin(load("eiffel"), home)
    trained = {"step": "train", "event": "step_end", "outputs": {"model": str(home / "one")}}
    for event in (trained, {"step": "upload", "event": "step_end"}):
        with run.events.open("a") as file:
            print(json.dumps(event), file=file)
    run.lock.close()
    return run.folder.rename(home / "runs" / "20260102-030405-6789").name


@pytest.mark.parametrize(("model", "trains"), [("one", False), ("other", False), ("one", True)])
def test_a_run_goes_on_only_with_the_model_that_it_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, trains: bool
) -> None:
    """Gone on with on other text, it would be refused at the upload, after a night's training;
    another model is reused where another run has trained it on that text."""
    home = tmp_path / "home"
    for name in ("one", "other"):
        (home / name).mkdir(parents=True)
        (home / name / "nudge.json").write_text(name)
    same = model == "one" and not trains
    before = cut_off(home)
    folder = home / "runs" / before
    engine(monkeypatch, tmp_path, f"TRAINS, MODEL = {trains}, {str(home / model)!r}\n{ONE}")
    run = begin(load("eiffel"), home)
    assert run.run_id == before
    ends = list(follow(run, home, {}, reuse=True))
    ended = ends[-1]
    assert (ended.run_id == before) is same
    assert ended.steps["upload"].status == "done"
    assert ended.folder.name == ended.run_id
    # A run's events never mention the other model.
    said = "".join(path.read_text() for path in folder.glob("events*.jsonl"))
    assert ('"step_start"' in said) is same
    if not same:
        again = begin(load("eiffel"), home)
        assert again.run_id not in (before, ended.run_id)


def started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> tuple[psutil.Process, Generator[Run, None, None]]:
    """The training of a run, which takes this long to write its checkpoint, and the run."""
    arguments = [str(seconds), str(tmp_path / "checkpoint")]
    engine(monkeypatch, tmp_path, f"ARGUMENTS = {arguments}\n{TWO}")
    run = begin(load("eiffel"), tmp_path / "home")
    following = follow(run, tmp_path / "home", {}, reuse=True)
    while not run.steps["train"].total:
        next(following)
    return psutil.Process(int(run.steps["train"].total)), following


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_that_is_stopped_waits_for_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine ends at once, its step does not: it would train on beside the next run."""
    step, following = started(tmp_path, monkeypatch, 1.0)
    monkeypatch.setattr(follow_module, "QUIET_S", 0.3)
    following.close()
    assert not runs(step)
    assert (tmp_path / "checkpoint").read_text() == "a checkpoint"
    assert "waiting for the step to end" in capsys.readouterr().err


def test_a_step_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, following = started(tmp_path, monkeypatch, 600)
    monkeypatch.setattr(follow_module, "ENDING_S", 0.5)
    following.close()
    assert not runs(step)


def test_a_second_interrupt_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, following = started(tmp_path, monkeypatch, 600)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(follow_module.time, "sleep", interrupted)  # type: ignore[attr-defined]
        following.close()
    assert not runs(step)
    assert not (tmp_path / "checkpoint").exists()


MAKES = """
import socket, tempfile
place = tempfile.mkdtemp()
socket.socket(socket.AF_UNIX).bind(os.path.join(place, "x" * 40))
print(place, flush=True)
if "--wait" in FLAGS:
    tell("ingest", "step_start")
    time.sleep(600)
end("summary", "done", place=place)
"""


def test_a_runs_temporary_files_go_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(monkeypatch, tmp_path, f"FLAGS = ''\n{MAKES}")
    home = tmp_path / "a long name" / ("x" * 60)
    run = begin(load("eiffel"), home)
    (*_, ended) = follow(run, home, {}, reuse=True)
    place = Path(ended.steps["summary"].outputs["place"])
    assert place.parent.name.startswith("nudge-")
    assert not place.parent.exists()
    assert not (run.folder / "tmp").is_symlink()


def test_a_killed_runs_temporary_files_go_when_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(monkeypatch, tmp_path, f"FLAGS = '--wait'\n{MAKES}")
    run = begin(load("eiffel"), tmp_path)
    following = follow(run, tmp_path, {}, reuse=True)
    while run.steps["ingest"].status != "running":
        next(following)
    link = run.folder / "tmp"
    place = link.readlink()
    left = [begin(load("eiffel"), tmp_path).folder / "tmp" for _ in range(2)]
    for each in left:
        target = tmp_path / f"nudge-of-{each.parent.name}"
        target.mkdir()
        each.symlink_to(target)
    left[1].readlink().rmdir()  # as a reboot does
    (mine := tmp_path / "mine").mkdir()
    foreign = begin(load("eiffel"), tmp_path).folder / "tmp"
    foreign.symlink_to(mine)
    begin(load("eiffel"), tmp_path)
    assert place.is_dir()  # that run is at work
    assert not left[0].is_symlink()
    assert mine.is_dir()  # no run made that
    assert not list(tmp_path.glob(f"nudge-of-{left[0].parent.name}"))
    following.close()
    assert not place.exists()


def test_a_server_does_not_keep_the_temporary_folder_of_the_run_that_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "of the run"))
    written = tmp_path / "written"
    for outer in ("", "/var/tmp"):
        monkeypatch.setenv("NUDGE_OUTER_TMPDIR", outer)
        command = [
            "sh",
            "-c",
            f"echo \"$TMPDIR\" > '{written}.part'; mv '{written}.part' '{written}'; sleep 9",
        ]
        processes.start(tmp_path, "server", command, address="", ready=written.exists, timeout_s=9)
        processes.stop(tmp_path, "server")
        assert written.read_text().strip() == outer
        written.unlink()


def test_the_steps_get_the_recipe_with_its_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file that is gone when the run has ended."""
    address = "https://me:canary@files.example/a.txt"
    program = """
file = sys.argv[sys.argv.index("--recipe") + 1]
tell("ingest", "step_start")
end("ingest", "done", file=file, text=open(file).read())
"""
    engine(monkeypatch, tmp_path, program)
    run = begin(load("eiffel", (f"ingest.data_uri={address}",)), tmp_path)
    for _ in follow(run, tmp_path, {}, reuse=False):
        pass
    read = run.steps["ingest"].outputs
    assert address in read["text"]
    assert not Path(read["file"]).exists()
    left = [path for path in run.folder.rglob("*") if path.is_file() and path != run.events]
    assert not [path for path in left if b"canary" in path.read_bytes()]
