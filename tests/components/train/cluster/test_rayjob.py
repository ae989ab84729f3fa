"""The RayJob object: its schema, its probes, and the lines of its log."""

import tomllib
from pathlib import Path
from typing import Any

from nudge.components.train.cluster import rayjob
from nudge.components.train.cluster.jobs import Step
from nudge.components.train.settings import LaunchSettings
from tests.kubernetes_schemas import definition, problems, schema

ROOT = Path(__file__).parents[4]


def containers(node: Any) -> list[dict[str, Any]]:
    """Every container in a job, at any depth."""
    if isinstance(node, list):
        return [found for each in node for found in containers(each)]
    if not isinstance(node, dict):
        return []
    return [*node.get("containers", []), *containers(list(node.values()))]


def test_the_rayjob_fits_the_schema_of_newer_and_older_releases() -> None:
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists"}
    settings = LaunchSettings(
        nodes=3, gpus_per_node=4, queue="gpus", priority_class="low", volume_claim="shared",
        tolerations=[gpu], node_selector={"zone": "a"},
    )  # fmt: skip
    found = definition({"apiVersion": rayjob.KIND.api_version, "kind": "RayJob"})
    assert found
    known = schema(found)
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u"}
    step = Step("i", owner, trusted={"configMap": {"name": "bundle"}})
    body = rayjob.body(settings, name="n", handover="s3://b/k", schema=known, step=step)
    assert problems(body) == []
    assert body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert body["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "low"
    assert body["metadata"]["ownerReferences"] == [owner]
    assert body["spec"]["entrypoint"].endswith("nudge.components.train.cluster.ray_driver s3://b/k")
    cluster = body["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 3
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert "nvidia.com/gpu" not in str(cluster["headGroupSpec"]["template"]["spec"]["containers"])
    submitter = body["spec"]["submitterPodTemplate"]
    for template in (group["template"], cluster["headGroupSpec"]["template"], submitter):
        assert template["metadata"]["labels"]["nudge/run"] == "n"
        assert template["spec"]["tolerations"] == [gpu]
        assert template["spec"]["containers"][0]["volumeMounts"]
    older = {"backoffLimit", "activeDeadlineSeconds"}
    spec = known["properties"]["spec"]["properties"]
    left = {"properties": {"spec": {"properties": {k: spec[k] for k in spec if k not in older}}}}
    body = rayjob.body(settings, name="n", handover="s3://b/k", schema=left, step=step)
    assert not older & set(body["spec"])


def ray_containers(settings: LaunchSettings) -> dict[str, dict[str, Any]]:
    """The containers of a RayJob's head and workers, by name."""
    found = definition({"apiVersion": rayjob.KIND.api_version, "kind": "RayJob"})
    assert found
    body = rayjob.body(settings, name="n", handover="h", schema=schema(found), step=Step("i"))
    assert body["spec"]["rayClusterSpec"]["rayVersion"] == rayjob.RAY_VERSION
    return {each["name"]: each for each in containers(body["spec"]["rayClusterSpec"])}


def test_the_ray_of_the_images_needs_no_probes_of_kuberay() -> None:
    """Those of KubeRay run wget, which the image lacks."""
    pinned = (ROOT / "images" / "requirements" / "train.txt").read_text(encoding="utf-8")
    assert f"\nray=={rayjob.RAY_VERSION} " in pinned
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (ray,) = extras["project"]["optional-dependencies"]["ray"]
    assert "default" in ray.partition("[")[2].rstrip("]").split(",")
    for container in ray_containers(LaunchSettings()).values():
        for name in ("readinessProbe", "livenessProbe"):
            assert "httpGet" in container[name]


def test_the_size_of_the_head_is_a_setting() -> None:
    head = ray_containers(LaunchSettings(head_cpu="500m", head_memory="2Gi"))["ray-head"]
    assert head["resources"]["requests"] == {"cpu": "500m", "memory": "2Gi"}
    assert head["resources"]["limits"] == {"cpu": "500m", "memory": "2Gi"}


def test_lines_of_a_worker_are_those_of_the_training() -> None:
    line = "train: 3/12 steps loss 5.1"
    assert rayjob.plain(f"\x1b[36m(RayTrainWorker pid=7, ip=10.0.0.1)\x1b[0m {line}") == line
    assert rayjob.plain(f"(RayTrainWorker pid=7) {line}") == line
    assert rayjob.plain(line) == line
