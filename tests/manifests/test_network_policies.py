"""Who reaches which port of which pod.

No cluster runs here: `allowed` computes what the NetworkPolicies of an overlay add up to.
"""

import ipaddress

import pytest

from nudge.components.train.cluster import job_status, rayjob, trainjob
from nudge.components.train.settings import LaunchSettings
from tests.manifests.run_objects import Object, job, served
from tests.manifests.test_manifests import OVERLAYS, built

HERE = {"kubernetes.io/metadata.name": "nudge"}
ELSEWHERE = {"kubernetes.io/metadata.name": "somebody-else"}
ROUTER = {"network.openshift.io/policy-group": "ingress"}
PLATFORM = {"kubernetes.io/metadata.name": "redhat-ods-applications"}
MONITORING = {"kubernetes.io/metadata.name": "openshift-user-workload-monitoring"}

STEP = {"pipelines.kubeflow.org/v2_component": "true"}
MODEL = {"serving.kserve.io/inferenceservice": "m"}
BENCH = {"notebook-name": "nudge-workbench"}
SERVER = {"component": "data-science-pipelines"}
NODE = {"jobset.sigs.k8s.io/jobset-name": "j"}
HEAD = {"ray.io/cluster": "c", "ray.io/node-type": "head", "nudge/part": "head"}
OWN_HEAD = {"ray.io/cluster": "d", "ray.io/node-type": "head"}
SUBMITTER = {"nudge/part": "submitter"}
OTHER = {"app": "other"}


def matches(selector: Object, labels: dict[str, str]) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    tests = {
        "Exists": lambda e: e["key"] in labels,
        "DoesNotExist": lambda e: e["key"] not in labels,
        "In": lambda e: labels.get(e["key"]) in e["values"],
        "NotIn": lambda e: labels.get(e["key"]) not in e["values"],
    }
    return all(tests[each["operator"]](each) for each in selector.get("matchExpressions", []))


def policies(overlay: str) -> list[Object]:
    return [
        each["spec"] for each in built(f"overlays/{overlay}") if each["kind"] == "NetworkPolicy"
    ]


def _port(rule: Object, port: int) -> bool:
    return "ports" not in rule or any(
        each["port"] == port and each.get("protocol", "TCP") == "TCP" for each in rule["ports"]
    )


def allowed(
    to: dict[str, str], port: int, pod: dict[str, str], namespace: dict[str, str] = HERE,
    overlay: str = "dev",
) -> bool:  # fmt: skip
    """Whether a pod with these labels in a namespace reaches a port of the project's pod ``to``."""

    def peer(each: Object) -> bool:
        if "ipBlock" in each:
            return False
        if "namespaceSelector" not in each:
            return namespace == HERE and matches(each["podSelector"], pod)
        return matches(each["namespaceSelector"], namespace) and matches(
            each.get("podSelector", {}), pod
        )

    selected = [
        policy
        for policy in policies(overlay)
        if "Ingress" in policy["policyTypes"] and matches(policy["podSelector"], to)
    ]
    assert selected, "no policy selects the pod, so that everybody reaches it"
    return any(
        _port(rule, port) and ("from" not in rule or any(peer(each) for each in rule["from"]))
        for policy in selected
        for rule in policy.get("ingress", [])
    )


def leaves(overlay: str, address: str, port: int) -> bool:
    """Whether a pod of the project may connect to an address outside of the cluster."""
    ip = ipaddress.ip_address(address)

    def peer(each: Object) -> bool:
        block = each.get("ipBlock")
        if block is None or ip not in ipaddress.ip_network(block["cidr"]):
            return False
        return not any(ip in ipaddress.ip_network(cut) for cut in block.get("except", []))

    return any(
        _port(rule, port) and ("to" not in rule or any(peer(each) for each in rule["to"]))
        for policy in policies(overlay)
        if "Egress" in policy["policyTypes"] and matches(policy["podSelector"], OTHER)
        for rule in policy.get("egress", [])
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(
    ("to", "port"),
    [(MODEL, 8080), (BENCH, 8888), (HEAD, 8265), (HEAD, 6379), (HEAD, 10001), (NODE, 29500)],
    ids=["vllm", "jupyter", "ray-dashboard", "ray-gcs", "ray-client", "torch"],
)
@pytest.mark.parametrize(
    ("pod", "namespace"),
    [
        (STEP, HERE),
        (BENCH, HERE),
        (MODEL, HERE),
        (OTHER, HERE),
        (OTHER, ROUTER),
        (OTHER, ELSEWHERE),
    ],
    ids=["step", "workbench", "model", "other", "router", "elsewhere"],
)
def test_no_port_without_a_login_is_open(
    overlay: str, to: dict[str, str], port: int, pod: dict[str, str], namespace: dict[str, str]
) -> None:
    assert not allowed(to, port, pod, namespace, overlay)


def test_the_database_of_the_pipelines_server_is_closed_to_steps_and_workbenches() -> None:
    assert not any(allowed(SERVER, 3306, pod) for pod in (STEP, BENCH, MODEL, OTHER))
    assert not any(allowed(SERVER, 8888, pod) for pod in (BENCH, MODEL, OTHER))


def test_a_project_elsewhere_reaches_no_pod() -> None:
    for to in (STEP, MODEL, BENCH, SERVER, NODE, HEAD, OWN_HEAD, OTHER):
        for port in (80, 443, 8080, 8265, 8443, 8888, 10001, job_status.PORT):
            assert not allowed(to, port, OTHER, ELSEWHERE)


def test_what_a_run_and_its_users_need_is_open() -> None:
    for login in (MODEL, BENCH, SERVER):
        assert allowed(login, 8443, OTHER, ROUTER)
    assert allowed(BENCH, 8443, OTHER, PLATFORM)
    assert allowed(MODEL, 8443, STEP)
    assert allowed(MODEL, 8080, OTHER, MONITORING)
    for port in (8080, 8887, 8888):  # metadata and the API, of a driver and a launcher
        assert allowed(SERVER, port, STEP)
    assert allowed(SERVER, 3306, SERVER)
    assert allowed(SERVER, 8443, BENCH)
    assert allowed(NODE, 29500, NODE)
    assert allowed(NODE, job_status.PORT, OTHER, PLATFORM)
    assert allowed(HEAD, 6379, {"ray.io/cluster": "c", "nudge/part": "worker"})
    assert allowed(HEAD, 8265, SUBMITTER)
    assert allowed(HEAD, 8265, OTHER, PLATFORM)
    assert allowed(OWN_HEAD, 10001, STEP)
    assert not allowed(OWN_HEAD, 8265, STEP)


def test_the_labels_are_those_of_the_pods() -> None:
    body = job(rayjob, LaunchSettings(nodes=2))
    cluster = body["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["template"]["metadata"]["labels"]["nudge/part"] == "head"
    labels = body["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert SUBMITTER.items() <= labels.items()
    assert trainjob.POD_LABEL in NODE


def test_a_model_without_authentication_is_reached_by_its_label_alone() -> None:
    for authentication in (True, False):
        labels = {**served(authentication=authentication)["metadata"]["labels"], **MODEL}
        assert allowed(labels, 8080, OTHER, ROUTER) is not authentication
        assert not allowed(labels, 8080, OTHER, ELSEWHERE)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_reaches_a_clouds_metadata_server(overlay: str) -> None:
    for address in ("169.254.169.254", "169.254.170.2", "100.100.100.200", "fd00:ec2::254"):
        assert not leaves(overlay, address, 80), address
        assert not leaves(overlay, address, 443), address


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_way_out_is_https_and_private_addresses(overlay: str) -> None:
    assert leaves(overlay, "10.1.2.3", 9000)
    for port in (22, 25, 80, 6667):
        assert not leaves(overlay, "93.184.216.34", port)
    assert leaves(overlay, "93.184.216.34", 443) is (overlay != "disconnected")
