"""The compiled YAML is what a dashboard takes, and made files are current."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from nudge.components.train.cluster import jobs
from nudge.pipelines import compile as compiling
from nudge.pipelines import placement
from nudge.pipelines.cli.main import main
from nudge.pipelines.steps import STEPS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=compiling.PIPELINES)
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    text = (ROOT / "pipelines" / "compiled" / f"{request.param}.yaml").read_text(encoding="ascii")
    assert len(text) < 256 * 1024
    return list(yaml.safe_load_all(text))


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    path = ROOT / "pipelines" / "compiled" / "train_and_serve.yaml"
    return dict(next(yaml.safe_load_all(path.read_text(encoding="ascii"))))


def tasks_by_group(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks of each DAG, by the name of its component; the root's under the empty name."""
    groups = {"": spec["root"], **spec["components"]}
    return {name: group["dag"]["tasks"] for name, group in groups.items() if "dag" in group}


def test_a_dashboard_takes_it(documents: list[dict[str, Any]]) -> None:
    spec = documents[0]
    assert 0 < len(spec["pipelineInfo"]["description"]) <= 255
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert 1 <= len(parameters) <= 15
    for name, parameter in parameters.items():
        assert 0 < len(parameter.get("description", "")) <= 255, name
        assert "defaultValue" in parameter or name in ("model_uri", "model_name", "version")


def test_nothing_is_installed_when_it_runs(documents: list[dict[str, Any]]) -> None:
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        assert "pip install" not in " ".join(executor["container"]["command"])


def test_every_step_says_what_it_needs(documents: list[dict[str, Any]]) -> None:
    spec, platform = documents
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    executors = spec["deploymentSpec"]["executors"]
    assert set(placed) == set(executors)
    for name, executor in executors.items():
        resources, place = executor["container"]["resources"], placed[name]
        for kind in ("CpuLimit", "CpuRequest", "MemoryLimit", "MemoryRequest"):
            assert resources[f"resource{kind}"], (name, kind)
        assert "_image" in executor["container"]["image"], name
        assert 0 < int(place["activeDeadlineSeconds"]) <= 96 * 3600, name
        assert place["configMapAsEnv"][0]["optional"] is True, name
        if name.removeprefix("exec-") in ("train", "evaluate"):
            (volume,) = place["emptyDirMounts"]
            assert (volume["mountPath"], volume["medium"]) == ("/dev/shm", "Memory")
            assert place["tolerations"][0]["tolerationJson"]["componentInputParameter"]
            assert place["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"]
            assert "gpu_type" in resources["accelerator"]["resourceType"]
            assert "gpu_count" in resources["accelerator"]["resourceCount"]


def test_a_retry_has_the_time_that_a_first_attempt_has(documents: list[dict[str, Any]]) -> None:
    """The backend writes these fields as Argo's limit, duration, factor and maxDuration, and the
    last is a deadline from the start of the first attempt: all attempts must fit in it."""
    spec, platform = documents
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = 0
    for tasks in tasks_by_group(spec).values():
        for name, task in tasks.items():
            if f"exec-{name}" not in placed:
                continue
            found += 1
            retry = task["retryPolicy"]
            assert set(retry) == {
                *("maxRetryCount", "backoffDuration", "backoffFactor", "backoffMaxDuration"),
            }
            retries, pause = retry["maxRetryCount"], int(retry["backoffDuration"].rstrip("s"))
            assert retries >= (4 if name.startswith("train") else 2)
            assert (pause, retry["backoffFactor"]) == (60, 2.0)
            waits = sum(pause * 2**number for number in range(retries))
            longest = int(placed[f"exec-{name}"]["activeDeadlineSeconds"])
            deadline = int(retry["backoffMaxDuration"].rstrip("s"))
            assert deadline >= (retries + 1) * longest + waits
    assert found


def test_a_pipeline_that_registers_says_so_to_its_first_step(
    documents: list[dict[str, Any]],
) -> None:
    tasks = {name: task for group in tasks_by_group(documents[0]).values()
             for name, task in group.items()}  # fmt: skip
    if "ingest" not in tasks:
        return
    given = tasks["ingest"]["inputs"]["parameters"]
    constant = given.get("registers", {}).get("runtimeValue", {}).get("constant", False)
    assert constant is ("register" in tasks)
    assert ("version" in given) is ("register" in tasks)


QUANTITIES = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30, "": 1.0}


def quantity(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(m|Mi|Gi|)", text)
    assert match is not None, text
    return float(match[1]) * QUANTITIES[match[2]]


def resources_of(documents: list[dict[str, Any]], size: str) -> dict[str, dict[str, float]]:
    """What each step requests and may use, as the backend resolves it: an input of the task, chosen
    by an expression, of which ``{...}[string_value]`` is the form used here (CEL)."""
    spec = documents[0]
    found: dict[str, dict[str, float]] = {}
    executors = spec["deploymentSpec"]["executors"]
    for group, tasks in tasks_by_group(spec).items():
        inputs = (spec["components"][group] if group else spec["root"])["inputDefinitions"]
        for name, task in tasks.items():
            if f"exec-{name}" not in executors:
                continue
            made = found.setdefault(name, {})
            for key in ("CpuRequest", "CpuLimit", "MemoryRequest", "MemoryLimit"):
                text = executors[f"exec-{name}"]["container"]["resources"][f"resource{key}"]
                if match := re.fullmatch(r"\{\{\$\.inputs\.parameters\['(.+)'\]\}\}", text):
                    given = task["inputs"]["parameters"][match[1]]
                    assert given["componentInputParameter"] in inputs["parameters"]
                    table = given["parameterExpressionSelector"].removesuffix("[string_value]")
                    text = json.loads(table)[size]
                made[key] = quantity(text)
    return found


@pytest.mark.parametrize(
    ("size", "cores", "memory"), [("small", 2, 6), ("medium", 8, 32), ("large", 16, 128)]
)
def test_every_step_fits_the_node_that_a_size_is_for(
    documents: list[dict[str, Any]], size: str, cores: int, memory: int
) -> None:
    """Small fits beside what else a node of two cores and OpenShift Local run."""
    found = resources_of(documents, size)
    assert found
    for name, each in found.items():
        assert 0 < each["CpuRequest"] < each["CpuLimit"], name
        assert 0 < each["MemoryRequest"] < each["MemoryLimit"], name
        assert each["CpuRequest"] <= cores / 2, name
        assert each["MemoryRequest"] <= memory * 2**30 / 2, name
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert not {"cpu", "memory"} & set(parameters)
    if "size" in parameters:
        assert parameters["size"]["defaultValue"] in placement.SIZES
        assert resources_of(documents, "large") != resources_of(documents, "small")


def test_secrets_are_named_by_a_parameter_and_never_held(
    documents: list[dict[str, Any]],
) -> None:
    placed = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, place in placed.items():
        passed = set()
        for secret in place.get("secretAsEnv", []):
            named = secret["secretNameParameter"]
            if "componentInputParameter" not in named:  # a Secret that a project may have
                assert named["runtimeValue"]["constant"] == placement.NOTIFICATIONS, name
                assert (name, secret["optional"]) == ("exec-summary", True)
                continue
            passed |= {pair["envVar"] for pair in secret["keyToEnv"]}
            assert "connection" in named["componentInputParameter"], name
            required = {pair["envVar"] for pair in secret["keyToEnv"] if not secret["optional"]}
            # A connection made on the dashboard need not have the others.
            assert required <= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT"}
        # A step and the job that it starts reach the store with the same keys.
        assert passed in (set(), {*jobs.CONNECTION_KEYS, *jobs.OPTIONAL_KEYS}), name
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        assert "env" not in executor["container"]


def test_every_parameter_reaches_the_group_that_uses_it(documents: list[dict[str, Any]]) -> None:
    """The backend resolves what a task uses in the inputs of the DAG around it."""
    spec, platform = documents
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for group, tasks in tasks_by_group(spec).items():
        holder = spec["components"][group] if group else spec["root"]
        known = set(holder["inputDefinitions"]["parameters"])
        for name, task in tasks.items():
            used = str([task.get("inputs", {}), placed.get(f"exec-{name}", {})])
            wanted = set(re.findall(r"'componentInputParameter': '([^']+)'", used))
            assert wanted <= known, (group, name)
            # A parameter of the pipeline is named plainly only at the root.
            inside = set(task.get("inputs", {}).get("parameters", {}))
            named = re.findall(r"parameters\['([^']+)'\]", str(task.get("inputs", {})))
            assert set(named) <= inside, (group, name)


def test_what_changes_the_world_or_reads_it_is_never_cached(spec: dict[str, Any]) -> None:
    tasks: dict[str, Any] = {}
    for component in (*spec["components"].values(), spec["root"]):
        tasks |= component.get("dag", {}).get("tasks", {})
    cached = {
        name
        for name, task in tasks.items()
        if task.get("cachingOptions", {}).get("enableCache") and f"exec-{name}" in str(spec)
    }
    assert cached == {"tokenize", "train"}


def test_the_pipelines_that_train_differ_in_the_step_that_does() -> None:
    graphs = []
    for name, step in (("train_and_serve", "train"), ("distributed_training", "train-on-nodes")):
        text = (ROOT / "pipelines" / "compiled" / f"{name}.yaml").read_text()
        groups = tasks_by_group(next(yaml.safe_load_all(text)))
        order = {
            task.replace("-on-nodes", ""): [
                each.replace("-on-nodes", "") for each in found.get("dependentTasks", [])
            ]
            for tasks in groups.values()
            for task, found in tasks.items()
            if not task.startswith("exit-handler")
        }
        assert step in str(groups)
        graphs.append(order)
    assert graphs[0] == graphs[1]
    assert graphs[0]["train"] == ["tokenize"]


def test_training_on_nodes_holds_no_gpu_while_its_job_does() -> None:
    text = (ROOT / "pipelines" / "compiled" / "distributed_training.yaml").read_text()
    spec, _ = yaml.safe_load_all(text)
    containers = {
        name: each["container"] for name, each in spec["deploymentSpec"]["executors"].items()
    }
    assert "accelerator" not in containers["exec-train-on-nodes"]["resources"]
    assert "accelerator" in containers["exec-evaluate"]["resources"]
    (inputs,) = [
        tasks["train-on-nodes"]["inputs"]["parameters"]
        for tasks in tasks_by_group(spec).values()
        if "train-on-nodes" in tasks
    ]
    given = {name for name, value in inputs.items() if "componentInputParameter" in value}
    assert given >= {"nodes", "gpus_per_node", "gpu_type", "tolerations", "image", "connection"}
    # A default would stand above what a recipe says of its job.
    defaults = spec["root"]["inputDefinitions"]["parameters"]
    assert [defaults[name]["defaultValue"] for name in ("nodes", "gpus_per_node")] == ["", ""]


def test_the_promotion_gates_what_changes_the_world(spec: dict[str, Any]) -> None:
    groups = tasks_by_group(spec)
    by_what = {tuple(sorted(set(tasks) - {"condition-3"})): tasks for tasks in groups.values()}
    assert set(by_what) >= {("deploy", "register", "upload"), ("evaluate", "tokenize", "train")}
    new_text = groups["comp-exit-handler-1"]["condition-2"]["triggerPolicy"]["condition"]
    assert "ingest-Output'] == 1" in new_text.replace("int(", "").replace(")", "")
    promote = groups["comp-condition-2"]["condition-3"]["triggerPolicy"]["condition"]
    assert "evaluate-Output'] == 1" in promote.replace("int(", "").replace(")", "")
    summary = spec["root"]["dag"]["tasks"]["summary"]
    assert summary["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_made_files_are_current() -> None:
    assert compiling.stale() == []


def test_check_names_what_is_stale_and_compile_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "ROOT", tmp_path)
    monkeypatch.setattr(compiling, "COMPILED", tmp_path / "compiled")
    monkeypatch.setattr(compiling, "RESOURCES", tmp_path / "resources")
    check = CliRunner().invoke(main, ["compile", "--check"])
    assert check.exit_code == 1
    assert "compiled/train_and_serve.yaml" in check.stderr
    assert "run `nudge compile`" in check.stderr
    assert not list(tmp_path.iterdir())
    assert CliRunner().invoke(main, ["compile"]).exit_code == 0
    assert CliRunner().invoke(main, ["compile", "--check"]).output == "current\n"
    page = tmp_path / "components" / "train" / "README.md"
    page.write_text(page.read_text() + "an edit by hand\n")
    check = CliRunner().invoke(main, ["compile", "--check"])
    assert (check.exit_code, check.stderr.count(".md")) == (1, 1)


def test_every_row_of_a_readme_says_something() -> None:
    made = {path.relative_to(ROOT): text for path, text in compiling.generated().items()}
    pages = [text for path, text in made.items() if path.match("components/*/README.md")]
    assert len(pages) == len({step.folder for step in STEPS.values()})
    for page in pages:
        rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
        assert rows
        assert all(row[3].strip() for row in rows), page


def test_images_are_pinned_by_digest_when_a_file_says_which(tmp_path: Path) -> None:
    digits = {"data": "f" * 64, "train": "0" * 64}
    pinned = {name: f"registry.local/nudge-{name}@sha256:{digits[name]}" for name in digits}
    (tmp_path / "digests.yaml").write_text(yaml.safe_dump(pinned))
    arguments = ["compile", "--digests", str(tmp_path / "digests.yaml")]
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, "--into" in refused.stderr) == (2, True)
    made = CliRunner().invoke(main, [*arguments, "--into", str(tmp_path / "made")])
    assert made.exit_code == 0
    texts = [path.read_text() for path in (tmp_path / "made").rglob("*.yaml")]
    assert len(texts) == 2 * len(compiling.PIPELINES)
    for text in texts:
        assert "quay.io" not in text
        images = re.findall(r"defaultValue: (\S*nudge-\S*image\S*|registry\.local/\S+)", text)
        assert images
        assert set(images) <= set(pinned.values())
    assert compiling.stale() == []


@pytest.mark.parametrize("text", ["[]", "{data: a@sha256:1, train: b}", "{", "data: x:latest"])
def test_a_digest_file_that_pins_nothing_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "digests.yaml"
    path.write_text(text)
    arguments = ["compile", "--digests", str(path), "--into", str(tmp_path / "made")]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2
    assert "digests.yaml" in refused.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", compiling.PIPELINES)
def test_the_resources_hold_the_same_pipeline_under_a_name_of_its_content(name: str) -> None:
    pipeline, version = yaml.safe_load_all((compiling.RESOURCES / f"{name}.yaml").read_text())
    text = (compiling.COMPILED / f"{name}.yaml").read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["metadata"]["name"] == f"{pipeline['metadata']['name']}-{digest[:12]}"
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]
    spec, platform = yaml.safe_load_all(text)
    assert version["spec"]["pipelineSpec"] == spec
    assert version["spec"]["platformSpec"] == platform


def test_compiling_in_another_process_gives_the_same_bytes() -> None:
    """The header's comments print defaults; those of sets and dicts once came in random order."""
    code = (
        "import sys; from nudge.pipelines import compile as c;"
        "sys.stdout.write(''.join(c.compiled(c.COMPILED, c.RESOURCES).values()))"
    )
    hashes = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        made = subprocess.run(command, env=environment, capture_output=True, check=True)
        hashes.add(hashlib.sha256(made.stdout).hexdigest())
    assert len(hashes) == 1
