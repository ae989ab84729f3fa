"""The step `train-on-nodes`: a pipeline's parameters define the job, and its model comes back."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import dsl

from nudge.components.common.core.errors import UserError
from nudge.components.train.component import train_on_nodes
from nudge.components.train.settings import LaunchSettings, TrainSettings, on_nodes
from tests.components.train.cluster.test_launch import really_trains
from tests.components.train.conftest import SMALL
from tests.kubernetes_api import KubernetesApi
from tests.kubernetes_schemas import problems

GPU = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
PARAMETERS = {
    "nodes": "1",
    "gpus_per_node": "0",
    "gpu_type": "nvidia.com/gpu",
    "image": "registry.local/train@sha256:0",
    "connection": "another-connection",
    "tolerations": [GPU],
    "node_selector": {"zone": "a"},
}


@pytest.mark.long
def test_parameters_define_the_job_and_its_model_comes_back(
    api: KubernetesApi, tiny_model: Path, tokens: Path, tmp_path: Path
) -> None:
    made: list[dict[str, Any]] = []
    trains = really_trains(api)

    def control(job: dict[str, Any]) -> None:
        made.append(job)
        trains(job)

    api.on_change("TrainJob", control)
    cluster = {"exchange": str(tmp_path / "shared"), "queue": "gpus", "nodes": 7, "cpu": "3"}
    recipe = {"base_model": str(tiny_model), "train": {**SMALL, "cluster": cluster}}

    def artifact(kind: Any, name: str) -> Any:
        return kind(name=name, uri=str(tmp_path / name), metadata={})

    model = artifact(dsl.Model, "model")
    train_on_nodes.python_func(
        recipe=yaml.safe_dump(recipe),
        **PARAMETERS,
        tokens=dsl.Dataset(name="tokens", uri=str(tokens), metadata={}),
        model=model,
        history=artifact(dsl.Artifact, "history"),
        report=artifact(dsl.HTML, "report"),
        metrics=artifact(dsl.Metrics, "metrics"),
    )
    assert model.metadata["steps"] == 12
    assert (tmp_path / "model" / "model.safetensors").is_file()
    job = made[0]
    assert problems(job) == []
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["image"]) == (1, PARAMETERS["image"])
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "3", "memory": "64Gi"}
    assert "another-connection" in str(trainer["env"])
    assert str([GPU]) in str(job["spec"]["runtimePatches"])
    assert str({"zone": "a"}) in str(job["spec"]["runtimePatches"])


def test_empty_parameters_keep_the_recipes_values() -> None:
    recipe = TrainSettings(base_model="b", cluster=LaunchSettings(nodes=7, runtime="mine"))
    found = on_nodes(recipe, {"nodes": "", "tolerations": [], "cpu": "2"})
    assert found.launcher == "trainjob"
    assert (found.cluster.nodes, found.cluster.runtime, found.cluster.cpu) == (7, "mine", "2")
    with pytest.raises(UserError, match=r"train\.cluster\.nodes = 'many'"):
        on_nodes(recipe, {"nodes": "many"})
