"""The compiled pipeline `distributed-training`, whole; a stand-in cluster really runs its job."""

from pathlib import Path
from typing import Any

import pytest
from kfp import components, local

from nudge.components.common.core.progress import last_events
from nudge.components.train.cluster.jobs import job_name
from nudge.pipelines import compile as compiling
from nudge.pipelines.local.runner import for_local_engine
from nudge.pipelines.recipes import load
from tests.components.train.cluster.test_launch import really_trains
from tests.kubernetes_api import KubernetesApi

TINY = Path(__file__).parents[1] / "end_to_end" / "tiny.yaml"
STEPS = ("ingest", "tokenize", "train", "evaluate", "upload", "register", "deploy", "summary")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_of_the_cluster_trains_what_is_served(
    connected: dict[str, str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUDGE_RUN_ID", "run-1")
    monkeypatch.setenv("NUDGE_EVENTS", str(tmp_path / "events.jsonl"))
    exchange = f"train.cluster.exchange={tmp_path / 'shared'}"
    changes = [f"base_model={tiny_model}", exchange, 'train.cluster.cpu="1"']
    recipe = load(str(TINY), changes).text
    arguments = {"recipe": recipe, "nodes": "1", "gpus_per_node": "0"}
    path = compiling.COMPILED / "distributed_training.yaml"
    compiled: Any = components.load_component_from_file(str(path))
    jobs: list[dict[str, Any]] = []
    with KubernetesApi(role="nudge-runner") as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path)))
        trains = really_trains(api)

        def control(job: dict[str, Any]) -> None:
            jobs.append(job)
            trains(job)

        api.on_change("TrainJob", control)
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(tmp_path / "artifacts"),
            raise_on_error=True,
        )
        for_local_engine(compiled, arguments)(**arguments)
        assert api.find("TrainJob", job_name("run-1")) is None
    assert [job["metadata"]["name"] for job in jobs] == [job_name("run-1")]
    assert jobs[0]["spec"]["trainer"]["resourcesPerNode"]["limits"]["cpu"] == "1"
    ended = {name: event["event"] for name, event in last_events().items()}
    assert ended == dict.fromkeys(STEPS, "step_end")
    assert last_events()["train"]["results"]["steps"] == 12
    assert last_events()["deploy"]["results"]["version"] == "run-1"
