"""The manifests: kustomize builds each overlay, and a cluster would take every object of it."""

import ast
import functools
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from nudge.components.common.clients.kube import ResourceKind
from nudge.components.common.clients.kueue import LOCAL_QUEUES, PENDING
from nudge.components.common.clients.pods import QUEUE
from nudge.components.common.core import provenance
from nudge.components.train.cluster.launch import ENGINES
from nudge.pipelines.cluster.doctor import TO_PROMOTE, TO_SUBMIT
from tests.kubernetes_api import rights
from tests.kubernetes_schemas import definition, problems

ROOT = Path(__file__).parents[2] / "manifests"
OVERLAYS = sorted(path.name for path in (ROOT / "overlays").iterdir())
BUILDS = [
    *(f"overlays/{name}" for name in OVERLAYS),
    *("cluster-admin", "data-connection", "pipelines"),
]
KUBERNETES = "1.33"


@functools.cache
def built(folder: str) -> list[dict[str, Any]]:
    """The objects that `kubectl kustomize` builds of a folder; the connection from its example."""
    kubectl = str(Path(sys.executable).parent / "kubectl")
    command = [kubectl, "kustomize", str(_with_connection(folder))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def _with_connection(folder: str) -> Path:
    if folder != "data-connection":
        return ROOT / folder
    import tempfile

    copy = Path(tempfile.mkdtemp()) / folder
    shutil.copytree(ROOT / folder, copy)
    shutil.copy(copy / "data-connection.env.example", copy / "data-connection.env")
    return copy


@functools.cache
def objects() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Every object of every build, by build, kind and name."""
    found = {}
    for folder in BUILDS:
        for each in built(folder):
            key = (folder, str(each["kind"]), str(each["metadata"]["name"]))
            assert key not in found, key
            found[key] = each
    return found


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [each for (_, kind, _), each in objects().items() if kind in kinds]


def test_there_is_an_overlay_for_each_use() -> None:
    assert set(OVERLAYS) == {"dev", "gpu", "multi-node", "disconnected"}
    kinds = {kind for _, kind, _ in objects()}
    assert kinds >= {
        *("Namespace", "DataSciencePipelinesApplication", "Secret", "ConfigMap", "ServiceAccount"),
        *("Role", "RoleBinding", "ServingRuntime", "ResourceFlavor", "ClusterQueue", "LocalQueue"),
        *("TrainingRuntime", "Notebook", "ImageStream", "PersistentVolumeClaim", "NetworkPolicy"),
        *("Pipeline", "PipelineVersion", "BuildConfig", "PrometheusRule"),
    }


def test_a_cluster_takes_every_object() -> None:
    checked, wrong = 0, []
    for key, each in objects().items():
        if definition(each) is not None:
            wrong += [(key, problem) for problem in problems(each)]
        else:
            try:
                kubernetes_validate.validate(each, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                wrong.append((key, error.message))
        checked += 1
    assert wrong == []
    assert checked > 90


def test_wrong_objects_would_be_noticed() -> None:
    runtime = dict(of_kind("ServingRuntime")[0])
    assert problems({**runtime, "spec": {**runtime["spec"], "containres": []}})
    build = of_kind("BuildConfig")[0]
    assert problems({**build, "spec": {**build["spec"], "runPolicy": 1}})
    assert problems({**build, "spec": {**build["spec"], "stratgy": {}}})
    rule = of_kind("PrometheusRule")[0]
    assert problems({**rule, "spec": {"groups": [{"rules": []}]}})
    policy = of_kind("NetworkPolicy")[0]
    wrong = {**policy, "spec": {**policy["spec"], "podSelektor": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_every_object_of_an_overlay_lives_in_its_project() -> None:
    for (folder, kind, name), each in objects().items():
        if folder.startswith(("overlays", "pipelines")) and kind != "Namespace":
            assert each["metadata"]["namespace"] == "nudge", name


def test_pipelines_are_applied_by_themselves() -> None:
    """The server lists a version by a label of its own webhook's, which is there only once the
    server is: a version that comes with the server or before it would never be listed
    (PipelineVersionsWebhook.Default and getK8sPipelineVersions of Kubeflow Pipelines,
    DSPAReconciler.Reconcile of the data-science-pipelines-operator).
    """
    kinds = {"Pipeline", "PipelineVersion"}
    found = {(folder, kind) for folder, kind, _ in objects() if kind in kinds}
    assert found == {("pipelines", kind) for kind in kinds}
    assert {kind for folder, kind, _ in objects() if folder == "pipelines"} == kinds


def test_the_project_enforces_the_level_restricted() -> None:
    for namespace in of_kind("Namespace"):
        labels = namespace["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_roles_ask_for_what_they_name_and_no_secret() -> None:
    for role in of_kind("Role"):
        for rule in role["rules"]:
            assert "*" not in str(rule), role["metadata"]["name"]
            assert "secrets" not in rule["resources"]
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])
    assert of_kind("ClusterRole", "ClusterRoleBinding") == []


VERBS = {
    "get": {"get"}, "poll": {"get"}, "list": {"list"}, "create": {"create"}, "patch": {"patch"},
    "apply": {"create", "patch"}, "delete": {"delete"},
}  # fmt: skip
"""The verbs of the Kubernetes API behind each method of `Cluster` that takes a kind."""


def asked_for() -> set[tuple[str, str, str]]:
    """(API group, resource, verb) of every call of a cluster in the steps; where a call's kind is
    not a constant, it may be each kind that its module, or what it chooses from, knows."""
    found = set()
    for path in sorted((ROOT.parent / "components").rglob("*.py")):
        name = ".".join(("nudge", *path.relative_to(ROOT.parent).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            receiver, method = ast.unparse(node.func.value), node.func.attr
            if receiver not in ("cluster", "self._cluster", "self.cluster"):
                continue
            if method == "log":
                found.add(("", "pods/log", "get"))
            if method == "subresource":
                (kind,) = {each.plural for each in LOCAL_QUEUES}
                found.add((LOCAL_QUEUES[0].group, f"{kind}/{PENDING}", "get"))
            if method not in VERBS or name == ResourceKind.__module__:
                continue
            known = vars(importlib.import_module(name))
            engines = [each.KIND for each in known.values() if hasattr(each, "KIND")]
            kinds = engines or [each for each in known.values() if isinstance(each, ResourceKind)]
            if ast.unparse(node.args[0]).endswith("engine.KIND"):
                kinds = [each.KIND for each in ENGINES.values()]
            named = known.get(ast.unparse(node.args[0]))
            for each in [named] if isinstance(named, ResourceKind) else kinds:
                found |= {(each.group, each.plural, verb) for verb in VERBS[method]}
    return found


def test_a_run_may_do_what_its_steps_ask_for_and_nothing_else() -> None:
    asked = asked_for()
    assert ("serving.kserve.io", "inferenceservices", "patch") in asked
    assert rights("nudge-runner") == asked


def test_the_roles_give_what_the_doctor_asks_for() -> None:
    for role, asked in (("nudge-author", TO_SUBMIT), ("nudge-runner", TO_PROMOTE)):
        given = rights(role)
        for verb, resource in asked:
            name, _, subresource = resource.partition("/")
            plural, _, group = name.partition(".")
            right = (group, f"{plural}/{subresource}" if subresource else plural, verb)
            assert right in given, role


def test_every_rule_is_justified_where_it_stands() -> None:
    lines = (ROOT / "base" / "access.yaml").read_text().splitlines()
    before = ""
    for line in lines:
        if line.strip().startswith("- apiGroups"):
            same = before.strip().startswith(("verbs:", "#"))
            assert same, line
        before = line
    assert sum(line.strip().startswith("#") for line in lines) >= 10


def node_of(runtime: dict[str, Any]) -> dict[str, Any]:
    """The container of a TrainingRuntime's nodes."""
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (node,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return dict(node)


def test_names_that_belong_together_agree() -> None:
    from nudge.components.common.core.images import DATA_IMAGE, TRAIN_IMAGE
    from nudge.pipelines.placement import CONNECTION, SETTINGS, SETTINGS_KEYS
    from nudge.pipelines.recipes import shipped_text

    found = objects()
    assert ("data-connection", "Secret", CONNECTION) in found
    settings = found["overlays/dev", "ConfigMap", SETTINGS]
    assert set(settings["data"]) <= set(SETTINGS_KEYS)
    server = found["overlays/dev", "DataSciencePipelinesApplication", "nudge"]
    storage = server["spec"]["objectStorage"]["externalStorage"]
    assert storage["s3CredentialsSecret"]["secretName"] == CONNECTION
    for binding in of_kind("RoleBinding"):
        if binding["metadata"]["name"] == "nudge-runner":
            assert binding["subjects"][0]["name"] == "pipeline-runner-nudge"
    notebook = found["overlays/dev", "Notebook", "nudge-workbench"]["spec"]["template"]["spec"]
    registry = found["cluster-admin", "RoleBinding", "nudge-runner"]
    accounts = [each["name"] for each in registry["subjects"]]
    assert accounts == ["pipeline-runner-nudge", notebook["serviceAccountName"]]
    assert {each["namespace"] for each in registry["subjects"]} == {"nudge"}
    given = {each["name"]: each["value"] for each in notebook["containers"][0]["env"]}
    # DSPO's Service of the API server, and its port that asks for a token.
    address = f"https://ds-pipeline-{server['metadata']['name']}.nudge.svc:8443"
    assert given["NUDGE_PIPELINES_URL"] == address
    version = of_kind("PipelineVersion")[0]
    parameters = version["spec"]["pipelineSpec"]["root"]["inputDefinitions"]["parameters"]
    assert parameters["data_image"]["defaultValue"] == DATA_IMAGE
    runtime = found["overlays/multi-node", "TrainingRuntime", "nudge-torch"]
    assert TRAIN_IMAGE in str(runtime)
    cluster = yaml.safe_load(shipped_text("many-nodes"))["train"]["cluster"]
    named = {"kind": cluster["runtime_kind"], "name": cluster["runtime"]}
    assert named == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    assert {"name": "shm", "mountPath": "/dev/shm"} in node_of(runtime)["volumeMounts"]
    queue = found["overlays/gpu", "LocalQueue", "default"]
    assert ("cluster-admin", "ClusterQueue", queue["spec"]["clusterQueue"]) in found


def test_a_workbench_asks_for_a_login_on_every_release() -> None:
    """JupyterLab asks for no login. The odh-notebook-controller of OpenShift AI 3 puts its proxy in
    front of it by one annotation, that of OpenShift AI 2 by the other."""
    for notebook in of_kind("Notebook"):
        assert "--ServerApp.token=''" in str(notebook["spec"])
        annotations = notebook["metadata"]["annotations"]
        assert annotations["notebooks.opendatahub.io/inject-auth"] == "true"
        assert annotations["notebooks.opendatahub.io/inject-oauth"] == "true"


def test_a_workbench_names_its_queue_where_kueue_manages_the_project() -> None:
    """The webhook /validate-kueue of the operator of OpenShift AI 3.0 to 3.3 refuses it else; Kueue
    itself sees its pod alone."""
    managed = set()
    for folder in OVERLAYS:
        (namespace,) = [e for e in built(f"overlays/{folder}") if e["kind"] == "Namespace"]
        (notebook,) = [e for e in built(f"overlays/{folder}") if e["kind"] == "Notebook"]
        queues = [e for e in built(f"overlays/{folder}") if e["kind"] == "LocalQueue"]
        queue = notebook["metadata"]["labels"].get(QUEUE)
        if namespace["metadata"]["labels"].get("kueue.openshift.io/managed") == "true":
            managed.add(folder)
            assert queue in [each["metadata"]["name"] for each in queues]
        else:
            assert (queue, queues) == (None, [])
    assert managed == {"gpu", "multi-node", "disconnected"}


def test_the_platform_scrapes_what_is_served() -> None:
    """The odh-model-controller makes a Service and a ServiceMonitor for an InferenceService by the
    annotations of its runtime; what scrapes by them must come in."""
    for runtime in of_kind("ServingRuntime"):
        (container,) = runtime["spec"]["containers"]
        (port,) = container["ports"]
        annotations = runtime["spec"]["annotations"]
        assert annotations["prometheus.io/port"] == str(port["containerPort"])
        assert annotations["prometheus.io/path"] == "/metrics"


def test_what_openshift_builds_says_which_code_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its builds give no CODE_VERSION, and what the image has then is not taken for one."""
    for build in of_kind("BuildConfig"):
        given = build["spec"]["strategy"]["dockerStrategy"]["buildArgs"]
        assert "CODE_VERSION" not in {each["name"] for each in given}
    text = (ROOT.parent / "images" / "Containerfile").read_text()
    (default,) = re.findall(r"^ARG CODE_VERSION=(.*)$", text, re.MULTILINE)
    monkeypatch.setenv("NUDGE_CODE_VERSION", default.strip('"'))
    monkeypatch.setattr(provenance, "ROOT", ROOT)  # no checkout, as in an image
    assert re.fullmatch(r"0\.2\.0\+src\.[0-9a-f]{12}", provenance.code_version.__wrapped__())


def test_a_disconnected_cluster_asks_no_registry_outside() -> None:
    """The images of the steps are parameters of the pipelines, which it compiles itself."""
    for (folder, kind, name), each in objects().items():
        if folder == "overlays/disconnected":
            images = re.findall(
                r"'(?:image|name|defaultValue)': '((?:quay|docker|registry)\.[^']+)'", str(each)
            )
            assert images == [], (kind, name)


def test_no_secret_is_in_the_repository() -> None:
    (secret,) = of_kind("Secret")
    assert secret["data"]["AWS_SECRET_ACCESS_KEY"] in ("", None)
    ignored = (ROOT.parent / ".gitignore").read_text()
    assert "*.env\n" in ignored  # manifests/data-connection/data-connection.env too


def mirrored() -> set[str]:
    text = (ROOT / "overlays" / "disconnected" / "imageset.yaml").read_text()
    wanted = yaml.safe_load(text)
    assert (wanted["apiVersion"], wanted["kind"]) == (
        "mirror.openshift.io/v2alpha1",
        "ImageSetConfiguration",
    )
    return {each["name"] for each in wanted["mirror"]["additionalImages"]}


def test_every_image_that_a_cluster_pulls_is_on_the_list_to_mirror() -> None:
    pulled = {
        image
        for (folder, _, _), each in objects().items()
        if folder.startswith(("overlays/", "pipelines")) and folder != "overlays/disconnected"
        for image in re.findall(r"'((?:quay|docker|registry)\.[^' ]+[:@][^' ]+)'", str(each))
    }
    assert len(pulled) >= 4
    assert pulled <= mirrored()


def test_what_is_mirrored_has_the_name_that_the_disconnected_overlay_asks_for() -> None:
    asked = {
        image
        for (folder, _, _), each in objects().items()
        if folder == "overlays/disconnected"
        for image in re.findall(r"'mirror\.example\.com/([^' ]+)'", str(each))
    }
    assert len(asked) == 2
    assert asked <= {image.partition("/")[2] for image in mirrored()}


IMMUTABLE = {
    "PersistentVolumeClaim": ("spec",),
    "RoleBinding": ("roleRef",),
    "ClusterRoleBinding": ("roleRef",),
    "Service": ("spec", "clusterIP"),
    "Deployment": ("spec", "selector"),
    # The operator makes a claim of it, which cannot shrink.
    "DataSciencePipelinesApplication": ("spec", "database", "mariaDB", "pvcSize"),
}
"""By kind, what the API server lets nobody change once the object is there."""


def fixed(each: dict[str, Any]) -> Any:
    value: Any = each
    for key in IMMUTABLE[each["kind"]]:
        value = value.get(key, {}) if isinstance(value, dict) else value
    return value


def test_every_overlay_applies_after_every_other() -> None:
    """Going from `dev` to `gpu` once failed: the workbench's volume had another size."""
    seen: dict[tuple[str, str], tuple[str, Any]] = {}
    for (folder, kind, name), each in objects().items():
        if folder.startswith("overlays/") and kind in IMMUTABLE:
            first, value = seen.setdefault((kind, name), (folder, fixed(each)))
            assert value == fixed(each), f"{kind} {name}: {first} and then {folder}"
    assert ("PersistentVolumeClaim", "nudge-workbench") in seen
