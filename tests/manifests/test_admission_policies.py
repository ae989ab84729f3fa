"""Which objects the account of a step may create and change.

No API server runs here: `tests.admission` evaluates the CEL of the policies.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from nudge.components.train.cluster import rayjob, trainjob
from nudge.components.train.cluster.jobs import Step
from nudge.components.train.settings import LaunchSettings
from tests import admission
from tests.manifests.run_objects import Object, job, served
from tests.manifests.test_manifests import BUILDS, ROOT, built

PROJECT = {"kubernetes.io/metadata.name": "nudge"}
ACCOUNT = "system:serviceaccount:nudge:pipeline-runner-nudge"


def refusals(
    body: Object, user: str = ACCOUNT, old: Object | None = None, within: str = ""
) -> list[str]:
    """The messages of the policies that refuse to create an object, in its namespace ``nudge``.

    With ``old``, to change that object to ``body``; ``within`` is a subresource, such as exec.
    """
    group = body["apiVersion"].rpartition("/")[0]
    plural, operation = f"{body['kind'].lower()}s", "UPDATE" if old else "CREATE"
    names = {plural, "*"} if not within else {f"{plural}/{within}", "*/*"}
    operation = "CONNECT" if within in ("exec", "attach", "portforward", "proxy") else operation
    found = []
    for policy in built("cluster-admin"):
        if policy["kind"] != "ValidatingAdmissionPolicy":
            continue
        rules = policy["spec"]["matchConstraints"]["resourceRules"]
        if any(
            group in rule["apiGroups"]
            and operation in rule["operations"]
            and names & set(rule["resources"])
            for rule in rules
        ):
            found += admission.messages(policy, operation, body, user, old)
    return found


SETTINGS = [
    LaunchSettings(),
    LaunchSettings(
        nodes=3, gpus_per_node=4, queue="gpus", volume_claim="nudge-shared",
        connection="nudge-data-connection", node_selector={"zone": "a"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
    ),
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "everything"])
@pytest.mark.parametrize("engine", [trainjob, rayjob], ids=["trainjob", "rayjob"])
def test_the_jobs_of_a_run_are_admitted(engine: Any, settings: LaunchSettings) -> None:
    assert refusals(job(engine, settings)) == []


def test_the_job_of_an_older_trainer_is_admitted() -> None:
    older: Object = {"properties": {"spec": {"properties": {"podTemplateOverrides": {}}}}}
    body = trainjob.body(
        SETTINGS[1], name="n", handover="s3://b/k", schema=older,
        step=Step("i", variables={"HF_HUB_OFFLINE": "1"}, trusted={"configMap": {"name": "ca"}}),
    )  # fmt: skip
    assert "podTemplateOverrides" in body["spec"]
    assert refusals(body) == []


def test_the_servers_of_a_run_are_admitted() -> None:
    bodies = [served(), served(stop_old_first=True), served(hardware_profile="p", gpus=1)]
    image = f"oci://r.io/models/m@sha256:{'0' * 64}"
    bodies += [served(image, pull_secret="nudge-data-connection")]
    assert [refusals(body) for body in bodies] == [[], [], [], []]
    with_account = copy.deepcopy(bodies[0])
    with_account["spec"]["predictor"]["serviceAccountName"] = "nudge-data-connection-sa"
    assert refusals(with_account) == []


SECRET = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "other", "key": "k"}}}


def ray(change: Callable[[Object], Any], part: str = "head") -> Object:
    """A RayJob of nudge's, the specification of its head (or its pod of one part) changed."""
    body = copy.deepcopy(job(rayjob, SETTINGS[1]))
    cluster = body["spec"]["rayClusterSpec"]
    parts = {
        "job": body["spec"],
        "cluster": cluster,
        "group": cluster["headGroupSpec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        "worker": cluster["workerGroupSpecs"][0]["template"]["spec"],
        "submitter": body["spec"]["submitterPodTemplate"]["spec"],
    }
    change(parts[part])
    return body


def train(change: Callable[[Object], Any], part: str = "pod") -> Object:
    body = copy.deepcopy(job(trainjob, SETTINGS[1]))
    (patch,) = body["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    change({"job": body["spec"], "trainer": body["spec"]["trainer"], "pod": pod}[part])
    return body


def server(change: Callable[[Object], Any], part: str = "predictor") -> Object:
    body = copy.deepcopy(served())
    predictor = body["spec"]["predictor"]
    parts = {
        "body": body,
        "spec": body["spec"],
        "predictor": predictor,
        "model": predictor["model"],
    }
    change(parts[part])
    return body


POD_ATTACKS: dict[str, Callable[[Object], Any]] = {
    "account": lambda pod: pod.update(serviceAccountName="pipeline-runner-nudge"),
    "old account": lambda pod: pod.update(serviceAccount="pipeline-runner-nudge"),
    "secret volume": lambda pod: pod["volumes"].append(
        {"name": "s", "secret": {"secretName": "x"}}
    ),
    "projected": lambda pod: pod["volumes"].append({"name": "s", "projected": {"sources": []}}),
    "csi": lambda pod: pod["volumes"].append({"name": "s", "csi": {"driver": "d"}}),
    "claim": lambda pod: pod["volumes"].append(
        {"name": "s", "persistentVolumeClaim": {"claimName": "mariadb-nudge"}}
    ),
    "secret variable": lambda pod: pod["containers"][0].setdefault("env", []).append(SECRET),
    "secret variables": lambda pod: pod["containers"][0].update(
        envFrom=[{"secretRef": {"name": "other"}}]
    ),
    "second container": lambda pod: pod["containers"].append({"name": "b", "env": [SECRET]}),
    "init container": lambda pod: pod.update(initContainers=[{"name": "b", "env": [SECRET]}]),
    "pull secret": lambda pod: pod.update(imagePullSecrets=[{"name": "other"}]),
}


@pytest.mark.parametrize("name", POD_ATTACKS)
@pytest.mark.parametrize("part", ["head", "worker", "submitter"])
def test_a_rayjob_takes_nothing_else_of_the_project(name: str, part: str) -> None:
    assert refusals(ray(POD_ATTACKS[name], part)) != []


@pytest.mark.parametrize("name", POD_ATTACKS)
def test_a_trainjob_takes_nothing_else_of_the_project(name: str) -> None:
    assert refusals(train(POD_ATTACKS[name])) != []


def another(group: str, kind: str) -> Callable[[], Object]:
    """Makes an object of a kind that no step creates."""
    return lambda: {"apiVersion": f"{group}/v1", "kind": kind}


OTHER_ATTACKS: dict[str, Callable[[], Object]] = {
    "ray redis": lambda: ray(
        lambda c: c.update(gcsFaultToleranceOptions={"redisPassword": SECRET}), "cluster"
    ),
    "ray autoscaler": lambda: ray(
        lambda c: c.update(autoscalerOptions={"env": [SECRET]}), "cluster"
    ),
    "ray tls": lambda: ray(lambda c: c.update(tlsOptions={"secretName": "other"}), "cluster"),
    "ray ingress": lambda: ray(lambda g: g.update(enableIngress=True), "group"),
    "another cluster": lambda: ray(lambda j: j.update(clusterSelector={"a": "b"}), "job"),
    "no cluster": lambda: ray(lambda j: j.pop("rayClusterSpec"), "job"),
    "initializer": lambda: train(
        lambda j: j.update(initializer={"model": {"secretRef": {"name": "other"}}}), "job"
    ),
    "trainer variable": lambda: train(lambda t: t["env"].append(SECRET), "trainer"),
    "trainer variables": lambda: train(
        lambda t: t.update(envFrom=[{"secretRef": {"name": "other"}}]), "trainer"
    ),
    "older override": lambda: train(
        lambda j: j.update(podTemplateOverrides=[{"spec": {"serviceAccountName": "x"}}]), "job"
    ),
    "older volume": lambda: train(
        lambda j: j.update(
            podTemplateOverrides=[{"spec": {"volumes": [{"name": "s", "secret": {}}]}}]
        ),
        "job",
    ),
    "second patch": lambda: train(
        lambda j: j["runtimePatches"].append(
            {"trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [{"template": {
                "spec": {"template": {"spec": {"serviceAccountName": "x"}}}}}]}}}}
        ),
        "job",
    ),
    "server account": lambda: server(lambda p: p.update(serviceAccountName="other")),
    "server volumes": lambda: server(lambda p: p.update(volumes=[{"name": "s", "secret": {}}])),
    "server container": lambda: server(lambda p: p.update(containers=[{"env": [SECRET]}])),
    "server workers": lambda: server(lambda p: p.update(workerSpec={})),
    "another framework": lambda: server(lambda p: p.update(sklearn={"env": [SECRET]})),
    "server pull secret": lambda: server(lambda p: p.update(imagePullSecrets=[{"name": "other"}])),
    "transformer": lambda: server(lambda s: s.update(transformer={"containers": []}), "spec"),
    "model variable": lambda: server(lambda m: m.update(env=[SECRET]), "model"),
    "model variables": lambda: server(lambda m: m.update(envFrom=[]), "model"),
    "model image": lambda: server(lambda m: m.update(image="evil.example/i"), "model"),
    "storage key": lambda: server(lambda m: m["storage"].update(key="other"), "model"),
    "claim of another": lambda: server(
        lambda m: m.update(storageUri="pvc://mariadb-nudge/x"), "model"
    ),
    "connection": lambda: server(
        lambda b: b["metadata"]["annotations"].update({"opendatahub.io/connections": "other"}),
        "body",
    ),
    "older labels": lambda: train(
        lambda j: j.update(podTemplateOverrides=[{"metadata": {"labels": {"a": "b"}}}]), "job"
    ),
    "server secret": lambda: server(
        lambda b: b["metadata"]["annotations"].update(
            {"serving.kserve.io/storageSecretName": "other"}
        ),
        "body",
    ),
    "server secret of the pods": lambda: server(
        lambda p: p.update(annotations={"serving.kserve.io/secretName": "other"})
    ),
    "server label": lambda: server(
        lambda b: b["metadata"]["labels"].update(component="data-science-pipelines"), "body"
    ),
    "server pod label": lambda: server(lambda p: p.update(labels={"ray.io/cluster": "c"})),
    "ray label": lambda: ray(
        lambda g: g["template"]["metadata"]["labels"].update(component="data-science-pipelines"),
        "group",
    ),
    "ray annotation": lambda: ray(
        lambda g: g["template"]["metadata"].update(annotations={"a": "b"}), "group"
    ),
    "train labels": lambda: train(
        lambda j: j.update(labels={"component": "data-science-pipelines"}), "job"
    ),
    "train pod labels": lambda: train(
        lambda j: j["runtimePatches"].append(
            {"trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [{"template": {
                "spec": {"template": {"metadata": {"labels": {"a": "b"}}}}}}]}}}}
        ),
        "job",
    ),
    "train job labels": lambda: train(
        lambda j: j["runtimePatches"].append(
            {"trainingRuntimeSpec": {"template": {"metadata": {"labels": {"a": "b"}}}}}
        ),
        "job",
    ),
    **{
        f"a {kind} of {group}": another(group, kind)
        for group, kind in (
            ("serving.kserve.io", "ServingRuntime"),
            ("serving.kserve.io", "LLMInferenceService"),
            ("trainer.kubeflow.org", "TrainingRuntime"),
            ("kubeflow.org", "Notebook"),
            ("build.openshift.io", "Build"),
            ("tekton.dev", "TaskRun"),
            ("serving.kserve.io", "InferenceGraph"),
            ("serving.kserve.io", "LLMInferenceServiceConfig"),
            ("apps", "ReplicaSet"),
            ("apps", "StatefulSet"),
            ("apps", "DaemonSet"),
            ("batch", "CronJob"),
            ("ray.io", "RayService"),
            ("argoproj.io", "Workflow"),
        )
    },
    "a service": lambda: {"apiVersion": "v1", "kind": "Service", "spec": {}},
    "a replication controller": lambda: {
        "apiVersion": "v1", "kind": "ReplicationController", "spec": {}
    },
    "a pod": lambda: {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {}},
    "a deployment": lambda: {"apiVersion": "apps/v1", "kind": "Deployment", "spec": {}},
    "a ray cluster": lambda: {"apiVersion": "ray.io/v1", "kind": "RayCluster", "spec": {}},
    "a batch job": lambda: {"apiVersion": "batch/v1", "kind": "Job", "spec": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_ATTACKS)
def test_a_step_creates_nothing_that_takes_other_secrets(name: str) -> None:
    body = OTHER_ATTACKS[name]()
    assert refusals(body) != []
    assert refusals(body, "system:serviceaccount:redhat-ods-applications:operator") == []


RUNNING: Object = {
    "apiVersion": "v1", "kind": "Pod",
    "metadata": {"name": "p", "labels": {"a": "b"}},
    "spec": {"containers": [{"name": "main", "image": "quay.io/nudge"}]},
}  # fmt: skip


@pytest.mark.parametrize(
    "within", ["exec", "attach", "portforward", "proxy", "ephemeralcontainers"]
)
def test_a_step_runs_nothing_in_the_pods_of_others(within: str) -> None:
    old = RUNNING if within == "ephemeralcontainers" else None
    assert refusals(RUNNING, within=within, old=old) != []
    assert refusals(RUNNING, "system:serviceaccount:nudge:ds-pipeline-nudge", old, within) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda pod: pod["spec"]["containers"][0].update(image="evil.example/i"),
        lambda pod: pod["spec"].update(activeDeadlineSeconds=9),
        lambda pod: pod["metadata"]["labels"].update(component="data-science-pipelines"),
        lambda pod: pod["metadata"].pop("labels"),
    ],
    ids=["image", "deadline", "label", "no labels"],
)
def test_a_step_changes_no_pod(change: Callable[[Object], Any]) -> None:
    changed = copy.deepcopy(RUNNING)
    change(changed)
    assert refusals(changed, old=RUNNING) != []
    annotated = copy.deepcopy(RUNNING)
    annotated["metadata"]["annotations"] = {"workflows.argoproj.io/outputs": "{}"}
    assert refusals(annotated, old=RUNNING) == []  # as Argo's executor may


def test_a_step_starts_no_build_and_no_proxy() -> None:
    build = {"apiVersion": "build.openshift.io/v1", "kind": "BuildConfig"}
    assert refusals(build, within="instantiate") != []
    assert refusals({"apiVersion": "v1", "kind": "Service"}, within="proxy") != []


def test_a_step_changes_no_service_of_others() -> None:
    service = {"apiVersion": "v1", "kind": "Service", "spec": {"selector": {"a": "b"}}}
    assert refusals(service, old={**service, "spec": {}}) != []


def test_each_policy_is_bound_to_the_project_and_denies() -> None:
    found = built("cluster-admin")
    names = {e["metadata"]["name"] for e in found if e["kind"] == "ValidatingAdmissionPolicy"}
    bindings = [e for e in found if e["kind"] == "ValidatingAdmissionPolicyBinding"]
    assert {each["spec"]["policyName"] for each in bindings} == names
    for binding in bindings:
        each = binding["spec"]
        assert binding["metadata"]["name"] == f"{each['policyName']}.nudge"
        assert each["validationActions"] == ["Deny"]
        labels = each["matchResources"]["namespaceSelector"]["matchLabels"]
        assert labels == PROJECT


def test_the_lists_name_the_connection_and_the_volume_of_the_manifests() -> None:
    text = (ROOT / "cluster-admin" / "jobs.yaml").read_text(encoding="utf-8")
    policies_with_lists = [
        {each["name"]: each["expression"] for each in policy["spec"]["variables"]}
        for policy in yaml.safe_load_all(text)
        if policy["kind"] == "ValidatingAdmissionPolicy" and "variables" in policy["spec"]
    ]
    found = [each for build in BUILDS for each in built(build)]
    named = {(each["kind"], each["metadata"]["name"]) for each in found}
    assert len(policies_with_lists) == 3
    for lists in policies_with_lists:
        for secret in yaml.safe_load(lists["secrets"]):
            assert ("Secret", secret) in named
        for claim in yaml.safe_load(lists["claims"]):
            assert ("PersistentVolumeClaim", claim) in named
