"""`nudge clean`: what the rules remove, exactly what that frees, and what is never touched."""

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_file
from nudge.components.common.models.own_copies import link_own_files
from nudge.components.deploy.local import gateway
from nudge.pipelines.cli.main import main
from nudge.pipelines.local import retention
from nudge.pipelines.local.run import begin
from nudge.pipelines.recipes import load
from tests.pipelines.finished_run import finished_run

DAY_S, WEIGHTS = 86400, 1 << 20


def nudge(*arguments: object, status: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


def aged(path: Path, days: float) -> None:
    then = time.time() - days * DAY_S
    os.utime(path, (then, then))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def weights(folder: Path) -> Path:
    path = folder / "artifacts" / "t" / "train" / "model" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(os.urandom(WEIGHTS))
    return path


def test_old_artifacts_go_and_the_history_stays(home: Path) -> None:
    runs = sorted((finished_run(home) for _ in range(3)), key=lambda each: each.run_id)
    model = weights(runs[0].folder)
    kept = home / "reuse" / "train" / "0" / "model"
    kept.parent.mkdir(parents=True)
    os.link(model, kept)
    for number, run in enumerate(runs):
        aged(run.folder, 40 - number)
    arguments = ("clean", "--runs", 1, "--reuse", 0, "--json")
    shown = json.loads(nudge(*arguments, "--dry-run").stdout)
    assert model.is_file()
    assert {Path(each["path"]).parent.name for each in shown["removals"]} == {
        *(run.run_id for run in runs[:2]),
    }
    # The reusable result, used today, still has the weights.
    assert shown["frees_bytes"] < WEIGHTS
    aged(kept.parent, 30)
    before = used(home)
    shown = json.loads(nudge(*arguments).stdout)
    assert shown["frees_bytes"] > WEIGHTS
    # Each run keeps the fingerprints of its documents, in a new small file.
    assert 0 <= shown["frees_bytes"] - (before - used(home)) <= 2 * 8192
    assert shown["used_bytes"] == before
    states = [row["state"] for row in json.loads(nudge("runs", "--json").stdout)]
    assert states == ["promoted"] * 3
    assert json.loads(nudge(*arguments).stdout)["removals"] == []


def used(home: Path) -> int:
    """The bytes of a home's files on the disk, each inode once."""
    found = {
        each.lstat().st_ino: each.lstat().st_blocks for each in home.rglob("*") if each.is_file()
    }
    return 512 * sum(found.values())


def test_what_is_in_use_stays_whatever_its_age(home: Path) -> None:
    served, active = finished_run(home), begin(load("eiffel"), home, fresh=True)
    finished_run(home)
    shares = {served.run_id: 100}
    route = gateway.Backends(1, shares, {served.run_id: "127.0.0.1:1"})
    gateway.switch(home / "gateway" / "m", route)
    for version in (served.run_id, "old", "older"):
        (home / "serving" / "m" / version).mkdir(parents=True)
    aged(home / "serving" / "m" / "older", 2)
    for folder in (home / "runs").iterdir():
        aged(folder, 1000)
    plan = retention.plan(home, retention.Rules(days=0, runs=0, reuse=0, history_days=0))
    paths = {each.path for each in plan.removals}
    assert not {served.folder, active.folder} & paths
    assert home / "serving" / "m" / "older" in paths
    assert not {home / "serving" / "m" / name for name in (served.run_id, "old")} & paths
    active.lock.close()


def test_leftovers_of_killed_processes_go_after_a_day(home: Path) -> None:
    for name in (".a.part-12", ".b.part-34"):
        (home / "reuse" / "train" / name).mkdir(parents=True)
    aged(home / "reuse" / "train" / ".a.part-12", 2)
    plan = retention.plan(home, retention.Rules())
    assert [(each.kind, each.path.name) for each in plan.removals] == [("leftover", ".a.part-12")]


def test_a_limit_removes_the_oldest_runs_first(home: Path) -> None:
    runs = sorted((finished_run(home) for _ in range(4)), key=lambda each: each.run_id)
    for number, run in enumerate(runs):
        weights(run.folder)
        aged(run.folder, 4 - number)
    limit = used(home) - WEIGHTS * 3 // 2
    plan = retention.plan(home, retention.Rules(max_gigabytes=limit / 1e9))
    assert [each.path.parent for each in plan.removals] == [run.folder for run in runs[:2]]
    assert used(home) - plan.frees <= limit


def test_rules_of_a_home_are_read_and_checked(home: Path) -> None:
    home.mkdir()
    (home / retention.FILE).write_text("days: 3\nruns: 2\n")
    assert retention.rules(home, {"runs": 1}) == retention.Rules(days=3, runs=1)
    (home / retention.FILE).write_text("dayz: 3\n")
    with pytest.raises(UserError, match="did you mean 'days'"):
        retention.rules(home)
    (home / retention.FILE).write_bytes(b"\0" * 9)
    with pytest.raises(UserError, match="is damaged .*delete it to use the defaults"):
        retention.rules(home)


def test_a_version_that_a_run_here_made_is_linked_and_not_copied(home: Path) -> None:
    run = finished_run(home)
    model = weights(run.folder)
    (model.parent / "config.json").write_text("{}")
    files = {
        name: {"sha256": sha256_file(model.parent / name), "bytes": None}
        for name in ("model.safetensors", "config.json")
    }
    manifest = {"format": "nudge.upload", "version": 1, "files": files}
    into = home / "serving" / "m" / run.run_id
    into.mkdir(parents=True)
    (into / "manifest.json").write_text(json.dumps(manifest))
    uri = f"s3://nudge/models/m/{run.run_id}"
    assert link_own_files(uri, into, {*files, "other"}) == set(files)
    assert (into / "model.safetensors").samefile(model)
    # A file that is not the uploaded one is left to the download.
    (into / "model.safetensors").unlink()
    model.write_bytes(b"changed")
    assert link_own_files(uri, into, {"model.safetensors"}) == set()
    assert link_own_files("s3://nudge/models/m/..", into, {"model.safetensors"}) == set()
