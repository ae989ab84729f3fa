"""The pod that trains on a cluster, and base models in buckets and on the hub, before training."""

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from aiohttp import web
from click.testing import CliRunner

from nudge.components.common.clients.bucket import BucketStore
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.preflight import machine, pod
from nudge.components.common.preflight.checks import Way, preflight
from nudge.components.common.preflight.pod import TrainingPod, check_pod, job_pod, sized_pod
from nudge.components.common.preflight.remote_base import check_remote_base
from nudge.components.train.room import check_room
from nudge.components.train.settings import LaunchSettings, TrainSettings
from nudge.pipelines.cli.main import main
from nudge.pipelines.placement import training_memory
from nudge.pipelines.recipes import load
from tests.web_server import Server

LARGE = 16 * 10**9
"""The bytes of a model of 8 billion parameters in bfloat16."""
DISK = namedtuple("DISK", "free")


def entry(key: str, size: int) -> str:
    stamp = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    return f"<Contents><Key>{key}</Key>{stamp}<Size>{size}</Size></Contents>"


def bucket(folders: dict[str, dict[str, bytes | int]]) -> Server:
    """A store with files below ``bases/``; one that is a number has that many bytes."""
    files = {f"{top}/{name}": body for top, of in folders.items() for name, body in of.items()}

    async def get(request: web.Request) -> web.Response:
        if start := request.query.get("prefix"):
            found = [
                entry(key, body if isinstance(body, int) else len(body))
                for key, body in files.items()
                if key.startswith(start)
            ]
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(found)}"
            return web.Response(text=f"{text}</ListBucketResult>", content_type="application/xml")
        body = files[request.match_info["any"].removeprefix("b/")]
        assert isinstance(body, bytes)  # the weights are not downloaded
        return web.Response(body=body, headers={"ETag": '"x"'})

    return Server(("*", "/{any:.*}", get))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    config = json.dumps({"model_type": "llama", "dtype": "bfloat16"}).encode()
    quantized = json.dumps({"quantization_config": {"quant_method": "gptq"}}).encode()
    folders: dict[str, dict[str, bytes | int]] = {
        "large": {"config.json": config, "a.safetensors": LARGE // 2, "b.safetensors": LARGE // 2},
        "adapter": {"adapter_config.json": b"{}"},
        "quantized": {"config.json": quantized},
        "pickled": {"config.json": config, "pytorch_model.bin": 1000},
    }
    with bucket(folders) as server:
        monkeypatch.setenv("AWS_S3_ENDPOINT", server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "nudge")
        yield


@pytest.mark.usefixtures("store")
def test_a_base_model_in_a_bucket_is_checked_without_its_weights() -> None:
    assert check_remote_base("s3://b/large") == LARGE // 2
    for name, says in (
        ("none", "has no config.json; name the folder of a model in the bucket"),
        ("adapter", "is only an adapter of its base model"),
        ("quantized", r"is quantized \(gptq\)"),
        ("pickled", r"has no \.safetensors"),
    ):
        with pytest.raises(UserError, match=f"^base_model s3://b/{name} {says}"):
            check_remote_base(f"s3://b/{name}")


def away(*_: object) -> None:
    raise Transient("the store is not reachable")


def test_a_bucket_that_is_not_reachable_here_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_S3_ENDPOINT", raising=False)
    assert check_remote_base("s3://b/large") == 0
    monkeypatch.setattr(BucketStore, "list", away)
    with bucket({}) as server:
        monkeypatch.setenv("AWS_S3_ENDPOINT", server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "nudge")
        assert check_remote_base("s3://b/large") == 0


def test_a_base_model_on_the_hub_is_checked_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def config(request: web.Request) -> web.Response:
        if request.match_info["name"] == "none":
            return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
        if request.match_info["name"] == "gated":
            return web.Response(status=403, headers={"X-Error-Code": "GatedRepo"})
        if request.match_info["revision"] == "v9":
            return web.Response(status=404, headers={"X-Error-Code": "RevisionNotFound"})
        headers = {"ETag": '"x"', "X-Repo-Commit": "0" * 40}
        return web.json_response({"model_type": "llama"}, headers=headers)

    async def model(_: web.Request) -> web.Response:
        size = {"parameters": {"BF16": LARGE // 2}, "total": LARGE // 2}
        return web.json_response({"id": "owner/model", "safetensors": size})

    constants = huggingface_hub.constants
    routes = (
        ("*", "/owner/{name}/resolve/{revision}/config.json", config),
        ("GET", "/api/models/{any:.*}", model),
    )
    with Server(*routes) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert check_remote_base("hf://owner/model") == 0  # HF_HUB_OFFLINE
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert check_remote_base("hf://owner/model") == LARGE // 2
        for uri, says in (
            ("hf://owner/none", "the hub has no model owner/none"),
            ("hf://owner/gated", "accept it there, and set HF_TOKEN"),
            ("hf://owner/model@v9", "owner/model has no revision 'v9'"),
        ):
            with pytest.raises(UserError, match=f"^base_model {uri}: .*{says}"):
                check_remote_base(uri)


def test_a_pod_without_gpus_needs_memory_for_the_training() -> None:
    small = sized_pod(training_memory(), "small", "0")
    assert small == TrainingPod("12Gi", "0")
    check_pod(800_000_000, "full", small)
    with pytest.raises(UserError, match=r"12Gi of memory and no GPU; training 900,000,000 .*13Gi"):
        check_pod(900_000_000, "full", small)
    check_pod(900_000_000, "lora", small)
    check_pod(900_000_000, "full", sized_pod(training_memory(), "large", "0"))
    check_pod(900_000_000, "full", sized_pod(training_memory(), "small", "1"))
    check_pod(900_000_000, "full", sized_pod(training_memory(), "huge", "0"))  # refused elsewhere
    check_pod(900_000_000, "full", sized_pod("", "", ""))
    nodes = {"nodes": 2, "gpus_per_node": 0, "memory": "10Gi"}
    check_pod(1_300_000_000, "full", job_pod(nodes))
    with pytest.raises(UserError, match="the 2 pods .* 10Gi of memory each.*train.cluster.memory"):
        check_pod(1_400_000_000, "full", job_pod(nodes))


def test_the_defaults_of_a_job_are_those_of_its_settings() -> None:
    default = LaunchSettings()
    stated = (pod.NODE_MEMORY, pod.NODES, pod.NODE_GPUS)
    assert stated == (default.memory, default.nodes, default.gpus_per_node)


@pytest.mark.usefixtures("store")
def test_the_first_step_knows_the_pod_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("eiffel", ["base_model=s3://b/large", "deploy.target=local"]).text
    small: dict[str, Any] = {"pod": sized_pod(training_memory(), "small", "0"), "publishes": False}
    preflight(recipe, Way.STEP, **small)  # not in a pod
    monkeypatch.setenv("KFP_POD_NAME", "run-1-system-container-impl-1")
    with pytest.raises(UserError, match=r"^the pod that trains has at most 12Gi .* size, or use"):
        preflight(recipe, Way.STEP, **small)
    with pytest.raises(UserError, match=r"^base_model s3://b/none has no config\.json"):
        preflight(recipe, Way.STEP, **small, base_model="s3://b/none")
    scratch = load(
        "eiffel", ["train.mode=scratch", "train.model_size=10M", "deploy.target=local"]
    ).text
    preflight(scratch, Way.STEP, **small)


@pytest.mark.usefixtures("store")
def test_submit_knows_the_pod_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as pipelines:
        monkeypatch.setenv("NUDGE_PIPELINES_URL", pipelines.url)  # it answers 404 at once
        base = ["--set", "base_model=s3://b/large", "--set", "train.mode=lora"]

        def said(*options: str) -> str:
            ended = CliRunner().invoke(main, ["submit", *base, *options])
            assert ended.exit_code == 2, ended.output
            return ended.stderr

        assert "the pod that trains has at most 32Gi" in said("-p", "gpu_count=0")
        assert "pod" not in said("-p", "gpu_count=0", "-p", "size=large")
        assert "pod" not in said()
        many = ("--pipeline", "distributed-training", "-p", "gpus_per_node=0")
        job = ("--set", "train.launcher=trainjob", "--set", "train.cluster.memory=10Gi")
        assert "the 2 pods that train have at most 10Gi" in said(*job, *many)
        assert "pod" not in said(*job, *many, "-p", "nodes=5")
        assert "base_model s3://b/none has no config" in said("-p", "base_model=s3://b/none")


@pytest.mark.usefixtures("store")
def test_the_pod_that_trains_checks_its_disk_and_memory_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainSettings(base_model="s3://b/large", mode="lora")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DISK(31 * 10**9))
    monkeypatch.setattr(machine, "memory_bytes", lambda: 64 << 30)
    check_room(settings, tmp_path)  # not in a pod
    monkeypatch.setenv("KFP_POD_NAME", "run-1-system-container-impl-1")
    with pytest.raises(UserError, match=r"31\.0 GB free.*about 32\.0 GB; use a node with a larger"):
        check_room(settings, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DISK(33 * 10**9))
    check_room(settings, tmp_path)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 32 << 30)
    with pytest.raises(UserError, match=r"34\.4 GB of memory; training 8,000,000,000 parameters"):
        check_room(settings, tmp_path)
