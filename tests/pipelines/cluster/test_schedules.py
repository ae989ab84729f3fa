"""`schedule`: made, replaced, paused and refused."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli.main import main
from nudge.pipelines.cluster import connect, schedules
from tests.pipelines.cluster.conftest import NIGHTLY, nudge, schedule_file
from tests.pipelines.cluster.pipelines_server import Pipelines


def test_a_schedule_takes_the_newest_version_and_applying_twice_changes_nothing(
    state: Pipelines, url: str, tmp_path: Path
) -> None:
    nudge("upload")
    file = schedule_file(tmp_path)
    made = nudge("schedule", "apply", file)
    assert made.exit_code == 0, made.output
    assert "nightly created" in made.stdout
    assert ":30:00 UTC" in made.stdout
    (recurring,) = state.recurring.values()
    assert recurring["status"] == "ENABLED"
    assert set(recurring["pipeline_version_reference"]) == {"pipeline_id"}
    assert (recurring["max_concurrency"], recurring["no_catchup"]) == ("1", True)
    assert recurring["trigger"] == {"cron_schedule": {"cron": "0 30 2 * * *"}}
    assert yaml.safe_load(recurring["runtime_config"]["parameters"]["recipe"])["name"] == "eiffel"
    changes = [asked for asked in state.asked if asked[0] != "GET"]
    assert "nightly unchanged" in nudge("schedule", "apply", file).stdout
    assert [asked for asked in state.asked if asked[0] != "GET"] == changes


def test_a_changed_schedule_replaces_the_old_one_and_its_run_goes_on(
    state: Pipelines, url: str, tmp_path: Path
) -> None:
    nudge("upload")
    nudge("schedule", "apply", schedule_file(tmp_path))
    (old,) = state.recurring
    running = {"run_id": "r", "display_name": "nightly 1", "recurring_run_id": old}
    state.runs = {
        **{str(n): {"run_id": str(n), "state": "SUCCEEDED"} for n in range(3)},
        "r": {**running, "state": "RUNNING"},
    }
    changed = {"cron": "0 0 4 * * *", "overlap": "allow", "catch_up": True}
    done = nudge("schedule", "apply", schedule_file(tmp_path, **changed))
    assert "nightly replaced" in done.stdout
    (new,) = [each for key, each in state.recurring.items() if key != old]
    assert (new["max_concurrency"], new["no_catchup"]) == ("10", False)
    assert state.runs["r"]["state"] == "RUNNING"
    statuses = {key: each["status"] for key, each in state.recurring.items()}
    assert statuses.pop(old) == "DISABLED"
    assert list(statuses.values()) == ["ENABLED"]
    state.runs["r"]["state"] = "SUCCEEDED"
    nudge("schedule", "apply", schedule_file(tmp_path, **changed))
    assert old not in state.recurring


def test_a_schedule_that_cannot_be_made_leaves_the_old_one_at_work(
    state: Pipelines, url: str, tmp_path: Path
) -> None:
    nudge("upload")
    nudge("schedule", "apply", schedule_file(tmp_path))
    server = connect.connect()
    wanted = schedules.read_schedule(Path(schedule_file(tmp_path, cron="0 0 5 * * *")))
    asked = server.change

    def refuse(
        self: connect.PipelinesServer, doing: str, call: Any, *given: Any, **named: Any
    ) -> Any:
        if "create" in call.__name__:
            state.breaks = [500]
        return asked(doing, call, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connect.PipelinesServer, "change", refuse)
        with pytest.raises(UserError, match="create the schedule nightly: .* answered 500"):
            schedules.apply(server, wanted)
    (recurring,) = state.recurring.values()
    assert recurring["status"] == "ENABLED"
    assert recurring["trigger"]["cron_schedule"]["cron"] == NIGHTLY["cron"]


def test_a_schedule_whose_runs_could_not_register_is_refused(
    state: Pipelines, url: str, tmp_path: Path
) -> None:
    nudge("upload")
    file = schedule_file(tmp_path, parameters={"version": "a/b"})
    refused = nudge("schedule", "apply", file)
    assert (refused.exit_code, state.recurring) == (2, {})
    assert "the version 'a/b' is refused" in refused.stderr


def test_pause_list_and_delete(state: Pipelines, url: str, tmp_path: Path) -> None:
    nudge("upload")
    assert "there is no schedule" in nudge("schedule", "list").stdout
    file = schedule_file(tmp_path)
    nudge("schedule", "apply", file)
    for number in range(3):
        nudge(
            "schedule",
            "apply",
            schedule_file(tmp_path, name=f"other-{number}", cron="", interval_minutes=90),
        )
    listed = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["schedule", "list"]).stdout
    rows = {row.split()[1]: row for row in listed.splitlines() if row.startswith("│")}
    assert list(rows) == ["nightly", "other-0", "other-1", "other-2"]
    for said in (
        "enabled",
        "0 30 2 * * *",
        "02:30:00 UTC (",
        "local time)",
        "forbidden",
        "dropped",
    ):
        assert said in rows["nightly"], said
    assert rows["nightly"].split()[-2] == "latest"
    assert "every 90 min" in rows["other-2"]
    assert nudge("schedule", "pause", "nightly").exit_code == 0
    (nightly,) = [each for each in state.recurring.values() if each["display_name"] == "nightly"]
    assert nightly["status"] == "DISABLED"
    assert "nightly enabled" in nudge("schedule", "apply", schedule_file(tmp_path)).stdout
    state.runs = {
        "r": {
            "run_id": "r",
            "display_name": "tonight",
            "recurring_run_id": nightly["recurring_run_id"],
            "state": "RUNNING",
        }
    }
    refused = nudge("schedule", "delete", "nightly")
    assert (refused.exit_code, state.runs["r"]["state"]) == (2, "RUNNING")
    assert "would end tonight" in refused.stderr
    assert nightly["status"] == "DISABLED"
    state.runs["r"]["state"] = "SUCCEEDED"
    assert nudge("schedule", "delete", "nightly").exit_code == 0
    assert len(state.recurring) == 3
    assert "no schedule 'nightly'" in nudge("schedule", "delete", "nightly").stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cron": "30 2 * * *"}, "expected six fields, seconds first"),
        ({"cron": "0 99 2 * * *"}, "cron = '0 99 2 * * *'"),
        ({"cron": ""}, "set either cron or interval_minutes"),
        ({"interval_minutes": 5}, "set either cron or interval_minutes"),
        ({"overlap": "maybe"}, "overlap = 'maybe'"),
        ({"crom": "x"}, "did you mean 'cron'"),
        ({"recipe": "eifel"}, "did you mean 'eiffel'"),
        ({"parameters": {"verson": "2"}}, "did you mean 'version'"),
        ({"parameters": {"tolerations": "none"}}, "tolerations = 'none': expected a list, such"),
        ({"parameters": {"node_selector": ["a"]}}, "node_selector = ['a']: expected a mapping"),
        ({"parameters": {"gpu_count": True}}, "gpu_count = True: expected a string, in quotes"),
        ({"parameters": {"version": datetime.date(2026, 1, 1)}}, "2026, 1, 1): expected a string"),
        ({"version": "train-and-serve-0"}, "has no version"),
    ],
)
def test_a_wrong_schedule_is_refused_and_changes_nothing(
    state: Pipelines, url: str, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    nudge("upload")
    refused = nudge("schedule", "apply", schedule_file(tmp_path, **changes))
    assert refused.exit_code == 2
    assert says in refused.stderr
    assert state.recurring == {}


def test_values_are_sent_in_the_types_of_the_pipeline(
    state: Pipelines, url: str, tmp_path: Path
) -> None:
    nudge("upload")
    given = {"gpu_count": 1, "version": 0.5, "tolerations": "[]", "node_selector": {"zone": "a"}}
    done = nudge("schedule", "apply", schedule_file(tmp_path, parameters=given))
    assert done.exit_code == 0, done.output
    (recurring,) = state.recurring.values()
    sent = recurring["runtime_config"]["parameters"]
    sent.pop("recipe")
    wanted = {"gpu_count": "1", "version": "0.5", "tolerations": [], "node_selector": {"zone": "a"}}
    assert sent == wanted


def test_a_file_that_is_no_text_is_refused(url: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("name: nightly", encoding="utf-16")
    refused = nudge("schedule", "apply", str(path))
    assert (refused.exit_code, "is not UTF-8 text" in refused.stderr) == (2, True)


def test_six_fields_have_their_seconds_first() -> None:
    after = datetime.datetime(2026, 1, 1, 12, 0, tzinfo=datetime.UTC)
    found = schedules.next_start("15 30 2 * * *", after)
    assert found == datetime.datetime(2026, 1, 2, 2, 30, 15, tzinfo=datetime.UTC)


def test_the_shipped_schedule_is_taken(state: Pipelines, url: str) -> None:
    nudge("upload")
    path = Path(__file__).parents[3] / "manifests" / "schedules" / "nightly.yaml"
    assert "nightly created" in nudge("schedule", "apply", str(path)).stdout
    (recurring,) = state.recurring.values()
    recipe = yaml.safe_load(recurring["runtime_config"]["parameters"]["recipe"])
    assert recipe["ingest"]["only_new"] is True
    assert recipe["base_model"].startswith("incumbent://")
