"""Every pod that a manifest or the code asks for passes under the level `restricted`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from nudge.components.common.clients.pods import RESTRICTED
from nudge.components.common.clients.registry.releases import Version
from nudge.components.deploy.kserve import objects
from nudge.components.deploy.settings import DeploySettings, KServeSettings
from nudge.components.train.cluster import launch, rayjob, trainjob
from nudge.components.train.cluster.jobs import Step
from nudge.components.train.settings import LaunchSettings
from nudge.pipelines.compile import COMPILED, PIPELINES
from tests.kubernetes_schemas import definition, problems, schema
from tests.manifests.test_manifests import ROOT, asked_for, of_kind
from tests.pod_security import violations

Object = dict[str, Any]

GOOD: Object = {
    "volumes": [{"name": "v", "emptyDir": {}}],
    "initContainers": [{"name": "i", "securityContext": dict(RESTRICTED)}],
    "containers": [{"name": "c", "securityContext": dict(RESTRICTED)}],
}
BAD: list[tuple[str, Callable[[Object], Any]]] = [
    ("pod: hostNetwork", lambda pod: pod.update(hostNetwork=True)),
    ("pod: runAsUser is 0", lambda pod: pod.update(securityContext={"runAsUser": 0})),
    (
        "pod: sysctl kernel.msgmax",
        lambda pod: pod.update(securityContext={"sysctls": [{"name": "kernel.msgmax"}]}),
    ),
    ("volume v: hostPath", lambda pod: pod["volumes"][0].update(hostPath={"path": "/"})),
    (
        "i: runAsNonRoot is not true",
        lambda pod: pod["initContainers"][0]["securityContext"].clear(),
    ),
    ("c: hostPort", lambda pod: pod["containers"][0].update(ports=[{"hostPort": 80}])),
    (
        "c: a probe or hook of another host",
        lambda pod: pod["containers"][0].update(livenessProbe={"httpGet": {"host": "x"}}),
    ),
    *(
        (f"c: {what}", lambda pod, more=more: pod["containers"][0]["securityContext"].update(more))
        for what, more in {
            "privileged": {"privileged": True},
            "allowPrivilegeEscalation is not false": {"allowPrivilegeEscalation": True},
            "capabilities: ALL are not dropped": {"capabilities": {"drop": ["KILL"]}},
            "capabilities: ['SYS_ADMIN'] are added": {
                "capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
            },
            "procMount": {"procMount": "Unmasked"},
            "runAsNonRoot is not true": {"runAsNonRoot": False},
            "seccompProfile is not set": {"seccompProfile": None},
            "seccompProfile is lifted": {"seccompProfile": {"type": "Unconfined"}},
            "appArmorProfile is lifted": {"appArmorProfile": {"type": "Unconfined"}},
            "seLinuxOptions": {"seLinuxOptions": {"type": "spc_t"}},
            "hostProcess": {"windowsOptions": {"hostProcess": True}},
        }.items()
    ),
]


def test_a_pod_that_asks_for_nothing_more_passes() -> None:
    assert violations(GOOD) == []


@pytest.mark.parametrize(("what", "change"), BAD, ids=[what for what, _ in BAD])
def test_each_control_refuses_what_it_forbids(what: str, change: Callable[[Object], Any]) -> None:
    pod = copy.deepcopy(GOOD)
    change(pod)
    assert what in violations(pod)


def merged(under: Any, over: Any) -> Any:
    """A strategic merge: lists of named objects by their names, all else as it comes last."""
    if isinstance(under, dict) and isinstance(over, dict):
        return {**under, **{key: merged(under.get(key), over[key]) for key in over}}
    named = isinstance(under, list) and isinstance(over, list)
    if named and all(isinstance(each, dict) and "name" in each for each in (*under, *over)):
        by_name = {each["name"]: each for each in under}
        by_name |= {each["name"]: merged(by_name.get(each["name"]), each) for each in over}
        return list(by_name.values())
    return over


def runtime_pods(runtime: Object) -> list[Object]:
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return [job["template"]["spec"]["template"]["spec"] for job in jobs]


def test_the_manifests_pods() -> None:
    pods = [each["spec"]["template"]["spec"] for each in of_kind("Notebook")]
    pods += [each["spec"] for each in of_kind("ServingRuntime")]
    pods += [pod for each in of_kind("TrainingRuntime") for pod in runtime_pods(each)]
    assert len(pods) >= 9
    assert [what for pod in pods for what in violations(pod)] == []


@pytest.mark.parametrize("name", PIPELINES)
def test_the_pods_of_a_run(name: str) -> None:
    """As the pipelines server makes them: it gives a step's container all that the level asks for
    but for runAsNonRoot, since a step's image might be made for root, and takes that from the task.

    backend/src/v2/compiler/argocompiler/security_context.go of Kubeflow Pipelines 2.17, the same in
    2.16.1 of OpenShift AI.
    """
    spec, platform = yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text())
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    given = {key: value for key, value in RESTRICTED.items() if key != "runAsNonRoot"}
    assert set(placed) == set(spec["deploymentSpec"]["executors"])
    for step, place in placed.items():
        mounts = place.get("emptyDirMounts", [])
        volumes = [{"name": each["volumeName"], "emptyDir": {}} for each in mounts]
        volumes += [{"name": "s", "secret": each} for each in place.get("secretAsVolume", [])]
        main = {"name": "main", "securityContext": {**given, **place["securityContext"]}}
        assert violations({"volumes": volumes, "containers": [main]}) == [], step
        asked = {"configMapAsEnv", "secretAsEnv", "fieldPathAsEnv", "emptyDirMounts", "tolerations"}
        asked |= {"nodeSelector", "activeDeadlineSeconds", "securityContext", "secretAsVolume"}
        assert set(place) <= asked, step  # nothing else that a pod could be refused for
        main = {"name": "main", "securityContext": given}
        assert violations({"containers": [main]}) == ["main: runAsNonRoot is not true"]


SETTINGS = [
    LaunchSettings(),
    LaunchSettings(
        nodes=3, gpus_per_node=4, queue="gpus", volume_claim="shared", connection="s3",
        tolerations=[{"key": "gpu", "operator": "Exists"}], node_selector={"zone": "a"},
    ),
]  # fmt: skip
STEP = Step("i", trusted={"configMap": {"name": "bundle"}})
BARE = {"containers": [{"name": trainjob.CONTAINER, "image": "i"}]}
"""A runtime of the platform's, as Kubeflow Trainer ships torch-distributed: it says nothing."""


def job(engine: Any, settings: LaunchSettings) -> Object:
    found = definition({"apiVersion": engine.KIND.api_version, "kind": engine.KIND.name})
    assert found
    body: Object = engine.body(
        settings, name="n", handover="s3://b/k", schema=schema(found), step=STEP
    )
    assert problems(body) == []
    return body


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_pods_of_a_trainjob_whatever_its_runtime_says(settings: LaunchSettings) -> None:
    (patch,) = job(trainjob, settings)["spec"]["runtimePatches"]
    (over,) = runtime_pods({"spec": patch["trainingRuntimeSpec"]})
    ours = [pod for each in of_kind("TrainingRuntime") for pod in runtime_pods(each)]
    assert ours
    assert violations(BARE) != []
    for runtime in (BARE, *ours):
        assert violations(merged(runtime, over)) == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_pods_of_a_rayjob(settings: LaunchSettings) -> None:
    spec = job(rayjob, settings)["spec"]
    cluster = spec["rayClusterSpec"]
    templates = [cluster["headGroupSpec"]["template"], spec["submitterPodTemplate"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    assert [violations(template["spec"]) for template in templates] == [[], [], []]


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_server_of_a_version_whatever_its_runtime_says(gpus: int) -> None:
    version = Version(
        model="m", name="v1", model_id="1", id="2", uri="s3://b/m/v1", archived=False, created_ms=0,
        properties={},
    )  # fmt: skip
    settings = DeploySettings(
        target="kserve", uploads="s3://b", kserve=KServeSettings(connection="s3", gpus=gpus)
    )
    body = objects.inference_service(version, settings)
    assert problems(body) == []
    over = {"name": "kserve-container", **body["spec"]["predictor"]["model"]}
    ours = [each["spec"] for each in of_kind("ServingRuntime")]
    assert ours
    for runtime in ({"containers": [{"name": "kserve-container"}]}, *ours):
        pod = merged(runtime, {"containers": [over]})
        assert violations(pod) == []
        # As in the pods of a real KServe: what it adds says nothing, whatever the server says. An
        # SCC fills it in; without SCCs the level restricted admits no such pod.
        pod["initContainers"] = [{"name": "storage-initializer"}]
        pod["containers"].append({"name": "kube-rbac-proxy"})
        refused = violations(pod)
        assert {each.partition(":")[0] for each in refused} == {
            "storage-initializer",
            "kube-rbac-proxy",
        }


def test_what_the_project_says_of_clusters_without_sccs() -> None:
    text = (ROOT / "base" / "project.yaml").read_text(encoding="utf-8")
    for part in ("without SCCs", "storage-initializer", "baseline"):
        assert part in text


def test_the_code_makes_no_object_with_pods_besides() -> None:
    created = {(group, plural) for group, plural, verb in asked_for() if verb == "create"}
    with_pods = {(engine.KIND.group, engine.KIND.plural) for engine in launch.ENGINES.values()}
    with_pods |= {("serving.kserve.io", "inferenceservices")}
    without = {("route.openshift.io", "routes"), ("coordination.k8s.io", "leases")}
    without |= {("gateway.networking.k8s.io", "httproutes"), ("", "configmaps")}
    assert created == with_pods | without


def test_builds_are_made_by_openshift_and_say_nothing_of_their_pods() -> None:
    """Its build controller is exempt from pod security in every namespace: cluster-kube-apiserver-
    operator, PodSecurityConfiguration."""
    builds = of_kind("BuildConfig")
    assert builds
    for build in builds:
        strategy = build["spec"]["strategy"]["dockerStrategy"]
        assert not {"volumes", "privileged"} & set(strategy)
        assert build["spec"]["strategy"]["type"] == "Docker"
