"""`upload` and `submit`: versions, and a run that is followed with its logs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nudge.pipelines.cli import display
from nudge.pipelines.cluster import connect, logs, nodes, waiting
from nudge.pipelines.compile import COMPILED, PIPELINES
from tests.kubernetes_api import KubernetesApi
from tests.pipelines.cluster.conftest import nudge
from tests.pipelines.cluster.pipelines_server import Pipelines


def test_a_version_is_uploaded_once(state: Pipelines, url: str) -> None:
    first = nudge("upload")
    assert (first.exit_code, first.stdout.split()[1]) == (0, "uploaded")
    again = nudge("upload", "train-and-serve")
    assert again.stdout.endswith("exists already\n")
    (version,) = state.versions.values()
    assert first.stdout.split()[0] == version["name"]
    text = (COMPILED / "train_and_serve.yaml").read_text()
    documents = list(yaml.safe_load_all(text))
    assert version["pipeline_spec"] == {
        "pipeline_spec": documents[0],
        "platform_spec": documents[1],
    }


def test_a_version_that_is_there_and_not_listed_is_told_how_to_mend(
    state: Pipelines, url: str
) -> None:
    """As one that was applied without the label that the server's webhook sets."""
    name = nudge("upload").stdout.split()[0]
    state.unlisted = set(state.versions)
    for _ in range(2):
        refused = nudge("upload")
        assert refused.exit_code == 2
        assert f"`oc delete pipelineversion {name}`, and upload again" in refused.stderr
    state.versions.clear()
    assert "uploaded" in nudge("upload").stdout


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
    text = (COMPILED / "train_and_serve.yaml").read_text()
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
RUNS_STILL = "0001-01-01T00:00:00Z"
"""What the server gives as the end of a task that runs."""

WORKFLOW = "train-and-serve-7vk7x"
GROUPS = {"tokenize": ".condition-2", "train": ".condition-2", "evaluate": ".condition-2"}


def tasks(name: str, state: str, *attempts: str, **more: Any) -> list[dict[str, Any]]:
    """The tasks of a step as the server makes them: names and children's ids, no ids of their own.

    ``attempts`` are the states of the attempts; none where the engine's cache had the answer.
    """
    path = f"{WORKFLOW}.root.exit-handler-1{GROUPS.get(name, '')}.{name}.executor"
    numbered = [f"{path}({number})" for number in range(len(attempts))]

    def task(shown: str, state: str, *children: str) -> dict[str, Any]:
        ids = [{"pod_name": nodes.node_id(WORKFLOW, child)} for child in children]
        end = END if state in ("SUCCEEDED", "FAILED", "SKIPPED") else RUNS_STILL
        times = {"start_time": START, "end_time": end}
        return {"display_name": shown, "state": state, "child_tasks": ids, **times}

    executor = task("executor", state if attempts else "SKIPPED", *numbered)
    made = [task(f"executor({number})", each) for number, each in enumerate(attempts)]
    return [
        task(f"{name}-driver", "SUCCEEDED"),
        {**task(name, state, path), **more},
        executor,
        *made,
    ]


def pod(name: str, attempt: int = 0) -> str:
    path = f"{WORKFLOW}.root.exit-handler-1{GROUPS.get(name, '')}.{name}.executor({attempt})"
    number = nodes.node_id(WORKFLOW, path).rpartition("-")[2]
    return f"{WORKFLOW}-retry-system-container-impl-{number}"


def shown(state: str, *made: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "state": state,
        "run_details": {"task_details": [each for some in made for each in some]},
    }


def recorded(name: str, state: str) -> dict[str, Any]:
    """What a real server reported about a run (Kubeflow Pipelines of 2026-08 with Argo 4.1)."""
    run = json.loads((Path(__file__).parent / name).read_text())
    return {"state": state, "run_details": run["run_details"], "finished_at": run["finished_at"]}


def test_logs_and_figures_of_the_steps_are_shown(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps inside of groups, attempts of a step, what came from the cache, what never began."""
    monkeypatch.setattr(logs, "INTERVAL_S", 0.0)
    before = [tasks("ingest", "SUCCEEDED", "SUCCEEDED"), tasks("tokenize", "SUCCEEDED")]
    state.logs = {
        pod("ingest"): 'ingest: 9/9 files\ningest: results {"documents": 9}\n',
        pod("train"): "the first try\n",
        pod("train", 1): "train: 1/2 steps loss 3.1\n\x1b[2Jhalf a li",
    }
    state.story = [
        shown("RUNNING", *before, tasks("train", "RUNNING", "FAILED", "RUNNING")),
        shown("SUCCEEDED", *before, tasks("train", "SUCCEEDED", "FAILED", "SUCCEEDED")),
    ]
    nudge("upload")

    answer = state._log

    def grows(run: str, name: str) -> Any:
        made = answer(run, name)
        if name == pod("train", 1):
            state.logs[name] += 'ne\ntrain: results {"loss": 2.5, "steps": 2, "more": [1]}\n'
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
    assert "train: running (2 attempts)" in done.stderr
    table = {row.split()[1]: row for row in done.stdout.splitlines() if row.count("│") == 5}
    assert list(table) == [
        *("ingest", "tokenize", "train", "evaluate", "upload", "register", "deploy", "summary"),
    ]
    assert "documents 9" in table["ingest"]
    assert "reused" in table["tokenize"]
    assert "loss 2.5" in table["train"]
    assert "2 attempts" in " ".join(done.stdout.split())
    assert "skipped" in table["deploy"]


def test_a_real_run_is_followed(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run as a real server reported it while it trained, and after deploy had failed twice."""
    monkeypatch.setattr(logs, "INTERVAL_S", 0.0)
    monkeypatch.setattr(display, "MINUTE_S", 0.0)
    train = f"{WORKFLOW}-retry-system-container-impl-2562324982"
    deploy = f"{WORKFLOW}-retry-system-container-impl-3645402195"
    evaluate = f"{WORKFLOW}-retry-system-container-impl-2726721535"  # as Argo hashes its name
    state.logs = {
        train: "train: 4/24 steps loss 3.1\n",
        evaluate: 'evaluate: results {"promote": 1, "reason": "better by 0.2 bits per byte"}\n',
        deploy: "error: the new pods crash\n",
    }
    running = recorded("run-running.json", "RUNNING")
    for each in running["run_details"]["task_details"]:
        # It was recorded between two steps; a moment before, this one ran.
        if each.get("start_time") == "2026-11-30T10:38:17Z":
            each |= {"state": "RUNNING", "end_time": RUNS_STILL}
    state.story = [running, running, running, recorded("run.json", "FAILED")]
    nudge("upload")
    answer = state._log

    def grows(run: str, name: str) -> Any:
        made = answer(run, name)
        if name == train:
            state.logs[name] += f"train: {4 + state.logs[name].count('steps')}/24 steps loss 2.9\n"
        return made

    monkeypatch.setattr(state, "_log", grows)
    done = nudge("submit")
    assert done.exit_code == 1
    assert not re.search(r" -\d", done.stderr)
    minute = [line for line in done.stderr.splitlines() if re.match(r"train: running \d+ s ", line)]
    assert minute
    assert re.search(r"\d+/24 steps \(\d+%\)  loss 2.9  about \d+ s left$", minute[-1])
    assert "deploy: failed 649.0 s (2 attempts)" in done.stderr
    assert "deploy | error: the new pods crash" in done.stderr
    assert f"its log: oc logs {deploy} -c main" in done.stderr
    assert re.search("verdict +better by 0.2 bits per byte", done.stdout)
    table = {row.split()[1]: row for row in done.stdout.splitlines() if row.count("│") == 5}
    assert [row.split("│")[2].strip() for row in table.values()][:4] == [
        *("44.0", "94.0", "229.0", "165.0"),
    ]


def test_the_end_shows_what_the_run_came_to(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "INTERVAL_S", 0.0)
    state.logs = {
        pod("ingest"): 'ingest: results {"new": 1}\n',
        pod("evaluate"): 'evaluate: results {"promote": 1, "reason": "it is better"}\n',
    }
    ended = [tasks(name, "SUCCEEDED", "SUCCEEDED") for name in ("ingest", "evaluate")]
    for name, results in {
        "upload": {"uri": "s3://models/m/1"},
        "register": {"registered_model": "m", "version": "v7"},
        "deploy": {"endpoint": "https://m.example", "served_model": "m"},
    }.items():
        monkeypatch.setitem(GROUPS, name, ".condition-2.condition-3")
        state.logs[pod(name)] = f"{name}: results {json.dumps(results)}\n"
        ended.append(tasks(name, "SUCCEEDED", "SUCCEEDED"))
    state.story = [shown("SUCCEEDED", *ended)]
    nudge("upload")
    done = nudge("submit")
    assert done.exit_code == 0, done.output
    rows = {row.split()[0]: row.strip() for row in done.stdout.splitlines() if row.strip()}
    assert rows["verdict"].endswith("it is better")
    assert rows["model"].endswith("s3://models/m/1")
    assert rows["registered"].endswith("m v7")
    assert rows["endpoint"].endswith("https://m.example")
    assert url in rows["report"] or url in done.stdout


@pytest.fixture
def workflow(
    state: Pipelines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dict[str, Any]]:
    """The nodes of the run's Workflow, by id, on a cluster that the user can reach."""
    monkeypatch.setattr(waiting, "INTERVAL_S", 0.0)
    found: dict[str, Any] = {}
    with KubernetesApi(role="nudge-author") as api:
        # Argo's CRD is not among the schemas here.
        api._kinds["workflows", "argoproj.io/v1alpha1"] = ("argoproj.io/v1alpha1", "Workflow")
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        answer = state._do

        def appear(name: str, *given: Any) -> Any:
            made = answer(name, *given)
            if name.endswith("CreateRun"):
                meta = {"name": WORKFLOW, "labels": {"pipeline/runid": made["run_id"]}}
                key = ("Workflow", api.namespace, WORKFLOW)
                api.objects[key] = {"metadata": meta, "status": {"nodes": found}}
            return made

        monkeypatch.setattr(state, "_do", appear)
        yield found


def add_node(workflow: dict[str, Any], path: str, phase: str, message: str) -> None:
    name = f"{WORKFLOW}.root.exit-handler-1{path}"
    number = nodes.node_id(WORKFLOW, name)
    workflow[number] = {"id": number, "name": name, "phase": phase, "message": message}


def test_a_step_that_waits_says_why(state: Pipelines, url: str, workflow: dict[str, Any]) -> None:
    state.story = [shown("RUNNING", tasks("train", "RUNNING", "PENDING"))] * 2
    state.story.append(shown("SUCCEEDED", tasks("train", "SUCCEEDED", "SUCCEEDED")))
    nudge("upload")
    room = "Unschedulable: 0/1 nodes are available: 1 Insufficient memory."
    add_node(workflow, ".condition-2.train.executor(0)", "Pending", room)
    done = nudge("submit")
    assert done.exit_code == 0, done.output
    assert f"train: waits: {room}" in done.stderr


@pytest.mark.parametrize("message", ["OOMKilled", "OOMKilled (exit code 137): more"])
def test_a_step_whose_memory_ran_out_says_so(
    state: Pipelines, url: str, workflow: dict[str, Any], message: str
) -> None:
    """In the words of older and of newer releases of Argo: while it is tried again, and at the end,
    for the steps that the size of a run changes."""
    state.story = [
        shown("RUNNING", tasks("ingest", "RUNNING", "FAILED", "RUNNING")),
        shown("FAILED", tasks("ingest", "FAILED", "FAILED", "FAILED")),
    ]
    nudge("upload")
    add_node(workflow, ".ingest.executor(0)", "Failed", message)
    add_node(workflow, ".ingest.executor(1)", "Running", "")
    done = nudge("submit")
    assert done.exit_code == 1
    said = f"its memory ran out: {message.partition(':')[0]}; submit it with a larger size: -p size"
    assert f"ingest: {said}" in done.stderr
    assert f"error: ingest: the step failed: {said}" in done.stderr


def test_a_step_without_sizes_names_none(
    state: Pipelines, url: str, workflow: dict[str, Any]
) -> None:
    state.story = [shown("FAILED", tasks("upload", "FAILED", "FAILED"))]
    nudge("upload")
    add_node(workflow, ".condition-2.condition-3.upload.executor(0)", "Failed", "OOMKilled")
    lines = nudge("submit").stderr.splitlines()
    assert "error: upload: the step failed: its memory ran out: OOMKilled" in lines


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
    assert f"the run continues: {url}/#/runs/details/{next(iter(state.runs))}" in done.stderr


@pytest.mark.parametrize(("status", "asked"), [(403, 1), (404, 1), (500, 3)])
def test_a_run_is_followed_where_its_logs_cannot_be_had(
    state: Pipelines, url: str, monkeypatch: pytest.MonkeyPatch, status: int, asked: int
) -> None:
    monkeypatch.setattr(logs, "INTERVAL_S", 0.0)
    running = shown("RUNNING", tasks("ingest", "RUNNING", "RUNNING"))
    state.story = [running] * 2 + [shown("SUCCEEDED", tasks("ingest", "SUCCEEDED", "SUCCEEDED"))]
    state.no_logs = status
    nudge("upload")
    done = nudge("submit")
    assert done.exit_code == 0, done.output
    assert ("no logs are available" in done.stderr) is (asked == 1)
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
    failed: dict[str, Any] = {"display_name": "train", "state": "FAILED"}
    failed["error"] = {"message": "out of memory"}
    failed["child_tasks"] = [{"pod_name": "train-and-serve-x-123"}]
    state.story = [{"state": "FAILED", "run_details": {"task_details": [failed]}}]
    nudge("upload")
    done = nudge("submit")
    assert done.exit_code == 1
    assert "error: train: out of memory" in done.stderr
    assert "oc logs train-and-serve-x-123" in done.stderr


def test_a_log_is_given_once_in_whole_lines_also_when_it_is_begun_anew() -> None:
    seen = logs._Seen()
    assert logs._fresh(seen, "one\ntw", over=False) == ["one"]
    assert logs._fresh(seen, "", over=False) == []  # it could not be had this time
    assert logs._fresh(seen, "one\ntwo\nthree\n", over=False) == ["two", "three"]
    assert logs._fresh(seen, "anew\n", over=False) == ["anew"]  # the node keeps so much and no more
    assert logs._fresh(seen, "anew\nlast words", over=True) == ["last words"]
