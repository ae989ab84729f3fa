"""upload, submit and schedule against a server that holds every request against the real API."""

import datetime
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from click.testing import CliRunner, Result
from nudge.components.common.errors import UserError
from nudge.pipelines.cli import main
from nudge.pipelines.cluster import connect, logs, runs, schedules
from nudge.pipelines.compile import PIPELINES

from tests.pipelines.cluster.pipelines_server import Pipelines, serving

NIGHTLY = {
    "name": "nightly",
    "recipe": "eiffel",
    "cron": "0 30 2 * * *",
    "parameters": {"gpu_count": "0"},
}


@pytest.fixture
def state() -> Pipelines:
    return Pipelines()


@pytest.fixture
def url(state: Pipelines, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", state.token)
    monkeypatch.setattr(runs, "POLL_S", 0.0)
    monkeypatch.setattr(runs.follow, "__defaults__", (0.0,))
    with serving(state) as address:
        monkeypatch.setenv("NUDGE_PIPELINES_URL", address)
        yield address
    assert state.faults == []


def nudge(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def schedule_file(folder: Path, **changes: Any) -> str:
    path = folder / "schedule.yaml"
    path.write_text(yaml.safe_dump({**NIGHTLY, **changes}))
    return str(path)


def test_a_version_is_uploaded_once(state: Pipelines, url: str) -> None:
    first = nudge("upload")
    assert (first.exit_code, first.stdout.split()[1]) == (0, "uploaded")
    again = nudge("upload", "train-and-serve")
    assert again.stdout.endswith("is there already\n")
    (version,) = state.versions.values()
    assert first.stdout.split()[0] == version["name"]
    text = (runs.COMPILED / "train_and_serve.yaml").read_text()
    documents = list(yaml.safe_load_all(text))
    assert version["pipeline_spec"] == {
        "pipeline_spec": documents[0],
        "platform_spec": documents[1],
    }


def test_every_pipeline_that_ships_can_be_uploaded(state: Pipelines, url: str) -> None:
    names = [name.replace("_", "-") for name in PIPELINES]
    for name in names:
        assert "uploaded" in nudge("upload", name).stdout
    assert [each["name"] for each in state.pipelines.values()] == names
    unknown = nudge("upload", "train-and-sevre")
    assert (unknown.exit_code, "did you mean 'train-and-serve'" in unknown.stderr) == (2, True)


def test_a_changed_pipeline_is_a_new_version_of_the_same(
    state: Pipelines, url: str, tmp_path: Path
) -> None:
    nudge("upload")
    path = tmp_path / "mine.yaml"
    text = (runs.COMPILED / "train_and_serve.yaml").read_text()
    path.write_text(text.replace("nvidia.com/gpu", "amd.com/gpu"))
    assert "uploaded" in nudge("upload", str(path)).stdout
    assert (len(state.pipelines), len(state.versions)) == (1, 2)


def test_a_run_is_followed_to_its_end(state: Pipelines, url: str) -> None:
    def task(name: str, value: str, **more: Any) -> dict[str, Any]:
        return {"display_name": name, "state": value, "start_time": "2026-01-01T00:00:00Z", **more}

    ended = {"end_time": "2026-01-01T00:00:42Z"}
    state.story = [
        {"state": "PENDING"},
        {"state": "RUNNING", "run_details": {"task_details": [task("ingest", "RUNNING")]}},
        {
            "state": "SUCCEEDED",
            "run_details": {"task_details": [task("ingest", "SUCCEEDED", **ended)]},
        },
    ]
    nudge("upload")
    done = nudge("submit", "eiffel", "--set", "train.epochs=2", "-p", "gpu_count=2")
    assert done.exit_code == 0, done.output
    assert "ingest: running" in done.stderr
    assert "ingest: done 42.0 s" in done.stderr
    assert done.stdout.endswith("succeeded\n")
    (run,) = state.runs.values()
    parameters = run["runtime_config"]["parameters"]
    assert parameters["gpu_count"] == "2"
    assert yaml.safe_load(parameters["recipe"])["train"]["epochs"] == 2
    (version,) = state.versions
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version
    assert f"{url}/#/runs/details/{run['run_id']}" in done.stdout


START, END = "2026-01-01T00:00:00Z", "2026-01-01T00:00:42Z"


def node(number: int, name: str, state: str, *children: int, **more: Any) -> dict[str, Any]:
    """A task as the server makes it of a workflow's node: its children by the nodes' own names,
    itself by its pod's, which have only the number at the end in common."""
    made = {"display_name": name, "state": state, "pod_name": f"run-abc-template-{number}"}
    made["child_tasks"] = [{"pod_name": f"run-abc-{child}"} for child in children]
    if state != "PENDING":
        made["start_time"] = START
    if state in ("SUCCEEDED", "FAILED"):
        made["end_time"] = END
    return {**made, **more}


def shown(state: str, *tasks: dict[str, Any]) -> dict[str, Any]:
    return {"state": state, "run_details": {"task_details": list(tasks)}}


def test_logs_and_figures_of_the_steps_are_shown(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps inside of groups, tries of a step, what came from the cache, what never began."""
    monkeypatch.setattr(logs, "INTERVAL_S", 0.0)
    around = [
        node(1, "train-and-serve-x", "RUNNING", 2),
        node(2, "ingest-driver", "SUCCEEDED", 3),
        node(3, "ingest", "SUCCEEDED", 4),
        node(4, "executor", "SUCCEEDED", 9),
        node(9, "condition-2", "RUNNING", 10),
        node(10, "tokenize", "SUCCEEDED", 11),
        node(11, "executor", "SKIPPED", 12),
        node(12, "train", "RUNNING", 13),
        node(13, "executor", "RUNNING", 14, 15),
        node(14, "executor(0)", "FAILED"),
    ]
    state.logs = {
        "run-abc-template-4": 'ingest: 9/9 files\ningest: results {"documents": 9}\n',
        "run-abc-template-14": "the first try\n",
        "run-abc-template-15": "train: 1/2 steps loss 3.1\n\x1b[2Jhalf a li",
    }
    running = [*around, node(15, "executor(1)", "RUNNING", start_time=END)]
    ended = [each for each in around if each["display_name"] != "train"]
    ended += [node(12, "train", "SUCCEEDED", 13), node(15, "executor(1)", "SUCCEEDED")]
    ended[-1]["start_time"] = END
    state.story = [shown("RUNNING", *running), shown("SUCCEEDED", *ended)]
    nudge("upload")

    answer = state._log

    def grows(run: str, pod: str) -> Any:
        made = answer(run, pod)
        if pod == "run-abc-template-15":
            state.logs[pod] += 'ne\ntrain: results {"loss": 2.5, "steps": 2, "more": [1]}\n'
        return made

    monkeypatch.setattr(state, "_log", grows)
    done = nudge("submit")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stderr.splitlines() if " | " in line]
    assert lines[:3] == [
        "ingest | ingest: 9/9 files",
        'ingest | ingest: results {"documents": 9}',
        "train | train: 1/2 steps loss 3.1",
    ]
    assert lines[3] == "train | [2Jhalf a line"
    assert len(lines) == 5
    assert "the first try" not in done.output
    table = {row.split()[1]: row for row in done.stdout.splitlines() if row.count("│") == 5}
    assert list(table) == [
        *("ingest", "tokenize", "train", "evaluate", "upload", "register", "deploy", "summary"),
    ]
    assert "documents 9" in table["ingest"]
    assert "reused" in table["tokenize"]
    assert "loss 2.5  steps 2" in table["train"]
    assert "skipped" in table["deploy"]


def test_a_server_that_goes_away_does_not_end_the_run(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "PATIENCE_S", 0.0)
    state.story = [shown("RUNNING")]
    nudge("upload")
    answer = state._do

    def break_when_followed(name: str, *given: Any) -> Any:
        if name.endswith("GetRun"):
            state.breaks = [504]
        return answer(name, *given)

    monkeypatch.setattr(state, "_do", break_when_followed)
    done = nudge("submit")
    assert done.exit_code == 2
    assert "answered 504" in done.stderr
    assert f"the run goes on: {url}/#/runs/details/{next(iter(state.runs))}" in done.stderr


@pytest.mark.parametrize(("status", "asked"), [(403, 1), (404, 1), (500, 3)])
def test_a_run_is_followed_where_its_logs_cannot_be_had(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch, status: int, asked: int
) -> None:
    monkeypatch.setattr(logs, "INTERVAL_S", 0.0)
    tasks = [node(3, "ingest", "RUNNING", 4), node(4, "executor", "RUNNING")]
    ended = [node(3, "ingest", "SUCCEEDED", 4), node(4, "executor", "SUCCEEDED")]
    state.story = [shown("RUNNING", *tasks)] * 2 + [shown("SUCCEEDED", *ended)]
    state.no_logs = status
    nudge("upload")
    done = nudge("submit")
    assert done.exit_code == 0, done.output
    assert ("no logs were shown" in done.stderr) is (asked == 1)
    assert sum(path.endswith("/log") for _, path in state.asked) == asked


def test_the_link_leads_to_the_dashboard_where_one_is_known(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nudge("upload")
    monkeypatch.setenv("NUDGE_NAMESPACE", "nudge")
    monkeypatch.setenv("NUDGE_DASHBOARD_URL", "https://dashboard.example/")
    done = nudge("submit", "--no-follow")
    run, link = done.stdout.split()
    assert link == f"https://dashboard.example/pipelineRuns/nudge/runs/{run}"
    monkeypatch.delenv("NUDGE_DASHBOARD_URL")
    program = tmp_path / "oc"
    program.write_text('#!/bin/sh\ncase "$*" in *consolelink*) echo https://rhoai.example;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "https://rhoai.example/pipelineRuns/nudge/runs/" in nudge("submit", "--no-follow").stdout


def test_a_failed_run_says_which_step_and_where_its_log_is(state: Pipelines, url: str) -> None:
    failed = {"display_name": "train", "state": "FAILED", "error": {"message": "out of memory"}}
    failed["child_tasks"] = [{"pod_name": "train-and-serve-x-123"}]
    state.story = [{"state": "FAILED", "run_details": {"task_details": [failed]}}]
    nudge("upload")
    done = nudge("submit")
    assert done.exit_code == 1
    assert "error: train: out of memory" in done.stderr
    assert "oc logs train-and-serve-x-123" in done.stderr


def test_what_the_pipeline_does_not_know_is_said_before_anything_runs(
    state: Pipelines, url: str
) -> None:
    missing = nudge("submit")
    assert missing.exit_code == 2
    assert "`nudge upload` brings it there" in missing.stderr
    nudge("upload")
    wrong = nudge("submit", "-p", "gpu_cuont=1")
    assert wrong.exit_code == 2
    assert "did you mean 'gpu_count'" in wrong.stderr
    assert "did you mean 'train-and-serve'" in nudge("submit", "--pipeline", "train-serve").stderr
    nudge("upload", "evaluate-only")
    lacking = nudge("submit", "--pipeline", "evaluate-only")
    assert lacking.exit_code == 2
    assert "needs model_uri (The model, as a run uploaded it" in lacking.stderr
    assert state.runs == {}


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

    def refuse(self: connect.Server, doing: str, call: Any, *given: Any, **named: Any) -> Any:
        if "create" in call.__name__:
            state.breaks = [500]
        return asked(doing, call, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connect.Server, "change", refuse)
        with pytest.raises(UserError, match="create the schedule nightly: .* answered 500"):
            schedules.apply(server, wanted)
    (recurring,) = state.recurring.values()
    assert recurring["status"] == "ENABLED"
    assert recurring["trigger"]["cron_schedule"]["cron"] == NIGHTLY["cron"]


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
    for said in ("enabled", "0 30 2 * * *", "02:30:00 UTC (", "here)", "forbidden", "dropped"):
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
        ({"cron": ""}, "give either cron or interval_minutes"),
        ({"interval_minutes": 5}, "give either cron or interval_minutes"),
        ({"overlap": "maybe"}, "overlap = 'maybe'"),
        ({"crom": "x"}, "did you mean 'cron'"),
        ({"recipe": "eifel"}, "did you mean 'eiffel'"),
        ({"parameters": {"cpus": "2"}}, "did you mean 'cpu'"),
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


def test_six_fields_have_their_seconds_first() -> None:
    after = datetime.datetime(2026, 1, 1, 12, 0, tzinfo=datetime.UTC)
    found = schedules.next_start("15 30 2 * * *", after)
    assert found == datetime.datetime(2026, 1, 2, 2, 30, 15, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "oc login"),
        (403, "nudge-author"),
        (404, "it is not there"),
        (409, "it is there already"),
        (500, "ds-pipeline"),
    ],
)
def test_a_refusal_is_one_sentence_that_says_what_to_do(
    state: Pipelines,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    says: str,
) -> None:
    monkeypatch.setattr(connect, "PATIENCE_S", 0.0)
    nudge("upload")
    asked, file = ("pause", "delete"), schedule_file(tmp_path)
    for command in (
        *(["upload"], ["submit"], ["schedule", "apply", file], ["schedule", "list"]),
        *(["schedule", verb, "nightly"] for verb in asked),
    ):
        state.breaks = [status]
        refused = nudge(*command)
        assert refused.exit_code == 2, command
        assert f"answered {status}" in refused.stderr
        assert says in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        assert state.token not in refused.output
    assert state.runs == state.recurring == {}


def test_a_question_is_asked_again_and_a_change_is_not(state: Pipelines, url: str) -> None:
    state.breaks = [503, 503]
    assert nudge("upload").exit_code == 0
    server, posts = connect.connect(), [asked for asked in state.asked if asked[0] == "POST"]
    state.breaks = [503]
    with pytest.raises(UserError, match="answered 503"):
        server.change(
            "create", server.api("ExperimentServiceApi").experiment_service_create_experiment, {}
        )
    assert len([asked for asked in state.asked if asked[0] == "POST"]) == len(posts) + 1
    state.asked.pop()


def test_a_server_that_is_away_slow_or_unknown(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "PATIENCE_S", 0.0)
    monkeypatch.setattr(connect, "TIMEOUTS_S", (0.5, 0.5))
    state.breaks = [0]
    assert "did not answer in time" in nudge("upload").stderr
    assert "cannot be reached" in nudge("upload", "--url", "http://127.0.0.1:1").stderr
    monkeypatch.delenv("NUDGE_PIPELINES_URL")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "set NUDGE_PIPELINES_URL" in nudge("upload").stderr


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure(
    state: Pipelines, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A server behind TLS as a cluster's is; its name there leads to this machine."""
    name = "ds-pipeline-nudge.nudge.svc"
    certificate = authority.issue_cert(name, "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    known = socket.getaddrinfo

    def here(host: str, *given: Any, **named: Any) -> Any:
        return known("127.0.0.1" if host == name else host, *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    monkeypatch.setattr(connect, "PATIENCE_S", 0.0)
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", state.token)
    pem = str(tmp_path / "server.pem")
    with serving(state, ssl_certfile=pem, ssl_keyfile=pem) as address:
        yield address.replace("127.0.0.1", name)


def test_a_cluster_s_own_ca_is_trusted_when_it_is_named(
    state: Pipelines, secure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = nudge("upload", "--url", secure)
    assert unknown.exit_code == 2
    assert "is not signed by a CA known here; set NUDGE_PIPELINES_CA" in unknown.stderr
    assert state.asked == []
    monkeypatch.setenv("NUDGE_PIPELINES_CA", str(tmp_path / "ca.crt"))
    assert "uploaded" in nudge("upload", "--url", secure).stdout
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.crt")
    monkeypatch.setenv("NUDGE_PIPELINES_CA", str(tmp_path / "other.crt"))
    assert "is not signed by a CA known here" in nudge("upload", "--url", secure).stderr
    monkeypatch.setenv("NUDGE_PIPELINES_CA", __file__)
    assert "cannot be read as PEM" in nudge("upload", "--url", secure).stderr


def test_the_certificate_must_be_of_the_name_that_was_asked_for(
    state: Pipelines, secure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_PIPELINES_CA", str(tmp_path / "ca.crt"))
    port = secure.rpartition(":")[2]
    other = nudge("upload", "--url", f"https://localhost:{port}")
    assert "is for another name" in other.stderr
    with serving(state) as plain:
        turned = nudge("upload", "--url", plain.replace("http:", "https:"))
    assert "does not speak TLS as it should" in turned.stderr
    assert state.asked == []


def test_a_pod_speaks_with_its_service_account(
    state: Pipelines, secure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUDGE_PIPELINES_TOKEN")
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text(f"{state.token}\n")
    (account / "namespace").write_text("nudge")
    shutil.copy(tmp_path / "ca.crt", account / "service-ca.crt")
    monkeypatch.setattr(connect, "ACCOUNT", account)
    assert "uploaded" in nudge("upload", "--url", secure).stdout
    assert state.faults == []


def test_a_person_speaks_with_the_token_of_oc(
    state: Pipelines, secure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUDGE_PIPELINES_TOKEN")
    monkeypatch.setenv("NUDGE_PIPELINES_CA", str(tmp_path / "ca.crt"))
    program = tmp_path / "oc"
    answers = f"*whoami*) echo {state.token};; *externalUrl*) echo {secure};;"
    program.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "uploaded" in nudge("upload").stdout


def test_token_ca_and_address_as_on_openshift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NUDGE_PIPELINES_URL", "NUDGE_PIPELINES_TOKEN", "NUDGE_PIPELINES_CA"):
        monkeypatch.delenv(name, raising=False)
    oc = tmp_path / "bin" / "oc"
    oc.parent.mkdir()
    oc.write_text(
        '#!/bin/sh\ncase "$*" in *whoami*) echo sha256~mine;; *) echo ds-pipeline.example;; esac\n'
    )
    oc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{oc.parent}:/usr/bin:/bin")
    found = connect.connect()
    assert (found.url, found.token) == ("https://ds-pipeline.example", "sha256~mine")
    assert "sha256~mine" not in repr(found)
    trustme.CA().cert_pem.write_to_path(tmp_path / "service-ca.crt")
    for name in ("token", "namespace"):
        (tmp_path / name).write_text(f"in-pod-{name}\n")
    monkeypatch.setattr(connect, "ACCOUNT", tmp_path)
    inside = connect.connect("https://ds-pipeline.project.svc:8443")
    assert (inside.token, inside.namespace) == ("in-pod-token", "in-pod-namespace")
    assert inside.ca == str(tmp_path / "service-ca.crt")
    monkeypatch.setenv("NUDGE_PIPELINES_CA", "/nowhere/ca.crt")
    with pytest.raises(UserError, match="no such file"):
        connect.connect("x")


def test_the_shipped_schedule_is_taken(state: Pipelines, url: str) -> None:
    nudge("upload")
    path = Path(__file__).parents[3] / "manifests" / "schedules" / "nightly.yaml"
    assert "nightly created" in nudge("schedule", "apply", str(path)).stdout
    (recurring,) = state.recurring.values()
    recipe = yaml.safe_load(recurring["runtime_config"]["parameters"]["recipe"])
    assert recipe["ingest"]["only_new"] is True
    assert recipe["base_model"].startswith("incumbent://")


def test_a_log_is_given_once_in_whole_lines_also_when_it_is_begun_anew() -> None:
    seen = logs._Seen()
    assert logs._fresh(seen, "one\ntw", over=False) == ["one"]
    assert logs._fresh(seen, "", over=False) == []  # it could not be had this time
    assert logs._fresh(seen, "one\ntwo\nthree\n", over=False) == ["two", "three"]
    assert logs._fresh(seen, "anew\n", over=False) == ["anew"]  # the node keeps so much and no more
    assert logs._fresh(seen, "anew\nlast words", over=True) == ["last words"]
