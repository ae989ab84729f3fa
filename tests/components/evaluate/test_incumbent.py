"""Finding the served version through a faulty registry and endpoint: never mistaken for none."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from nudge.components.common.artifacts.evaluation import Incumbent
from nudge.components.common.clients import bucket
from nudge.components.common.clients.registry import connection
from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import Served, find_version, note_served
from nudge.components.common.core.publish import sha256_file, write_manifest
from nudge.components.common.models import base_model
from nudge.components.evaluate import incumbent
from nudge.components.evaluate.incumbent import bring, find_incumbent
from nudge.components.evaluate.settings import evaluate_settings
from tests.faulty_proxy import FAULTS, Fault, FaultyProxy
from tests.local_registry import running_registry
from tests.web_server import Server

MODEL = "served"


async def well(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


@pytest.fixture(scope="module")
def endpoint() -> Iterator[FaultyProxy]:
    """A healthy server that only knows its health address."""
    with Server(("GET", "/health", well)) as server, FaultyProxy(server.url, share=0) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def known(endpoint: FaultyProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    """A registry that says that v1 of a model is served at the endpoint."""
    from model_registry import ModelRegistry

    home = tmp_path_factory.mktemp("registry")
    with running_registry(home) as url:
        ModelRegistry(url, author="test", is_secure=False).register_model(
            MODEL,
            "s3://bucket/models/served/v1",
            version="v1",
            model_format_name="vLLM",
            model_format_version="1",
            metadata={"model_sha256": "of-the-run"},
        )
        version = with_registry(url, find_version(MODEL, "v1"))
        served = Served(MODEL, endpoint.url, {"v1": 100}, ("v1",))
        with_registry(url, note_served(version, served, "test", "vllm"))
        with FaultyProxy(url, share=0) as proxy:
            yield proxy


@pytest.fixture(autouse=True)
def _quick(
    endpoint: FaultyProxy, known: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setattr(connection, "ATTEMPTS_S", 0.5)
    monkeypatch.setattr(incumbent, "ATTEMPTS", 2)
    yield
    for proxy in (endpoint, known):
        proxy.share, proxy.faults = 0.0, FAULTS
        proxy.planned.clear()


def test_the_served_version_is_found(known: FaultyProxy) -> None:
    found = find_incumbent(MODEL, known.url)
    uri = "s3://bucket/models/served/v1"
    assert found == Incumbent("found", "v1", uri, "of-the-run", shares={"v1": 100})
    assert find_incumbent("another", known.url) == Incumbent("none")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_registry_gives_unknown(known: FaultyProxy, fault: Fault) -> None:
    known.share, known.faults = 1.0, (fault,)
    for model in (MODEL, "another"):
        found = find_incumbent(model, known.url)
        if fault == "slow":
            assert found.state == ("found" if model == MODEL else "none")
        else:
            assert found.state == "unknown"
            assert f"the model registry {known.url}" in found.why


def test_a_missing_registry_gives_unknown() -> None:
    found = find_incumbent(MODEL, "http://127.0.0.1:9")
    assert found.state == "unknown"
    assert "does not answer" in found.why


def test_a_wrong_registry_path_gives_unknown(known: FaultyProxy) -> None:
    found = find_incumbent(MODEL, f"{known.url}/elsewhere")
    assert found.state == "unknown"
    assert "is not a Model Registry" in found.why


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_endpoint_gives_unknown(
    known: FaultyProxy, endpoint: FaultyProxy, fault: Fault
) -> None:
    endpoint.share, endpoint.faults = 1.0, (fault,)
    found = find_incumbent(MODEL, known.url)
    if fault in ("429", "slow"):  # a server answers
        assert found.state == "found"
    else:
        assert (found.state, found.version) == ("unknown", "v1")
        assert f"{endpoint.url}, which does not answer" in found.why
        assert "nudge promote v1" in found.why


def test_an_endpoint_slower_than_the_timeout_gives_unknown(
    known: FaultyProxy, endpoint: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incumbent, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(endpoint, "slow_s", 2.0)
    endpoint.share, endpoint.faults = 1.0, ("slow",)
    found = find_incumbent(MODEL, known.url)
    assert found.state == "unknown"
    assert "Timeout" in found.why


def test_a_gateway_without_a_route_is_not_a_server(endpoint: FaultyProxy) -> None:
    assert incumbent._silent(f"{endpoint.url}/elsewhere") == "status 404"


def test_one_bad_answer_is_retried(
    known: FaultyProxy, endpoint: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "ATTEMPTS_S", 60.0)
    endpoint.planned.append("503")
    known.planned.append("503")
    assert find_incumbent(MODEL, known.url).state == "found"


def test_no_fault_makes_a_served_model_look_unserved(
    known: FaultyProxy, endpoint: FaultyProxy
) -> None:
    known.share = endpoint.share = 0.5
    states = {find_incumbent(MODEL, known.url).state for _ in range(3)}
    assert states <= {"found", "unknown"}


def test_changed_weights_are_rejected(tiny_model: Path, tmp_path: Path) -> None:
    """By the upload's manifest, and by the registry if the manifest was changed too."""
    remote = tmp_path / "remote"
    shutil.copytree(tiny_model, remote)
    files = {path.name: {"sha256": sha256_file(path)} for path in remote.iterdir()}
    write_manifest(remote / "manifest.json", "nudge.upload", 1, {"files": files})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUDGE_HOME", str(tmp_path / "home"))
        patch.setattr(
            bucket,
            "download_folder",
            lambda uri, folder, *_: shutil.copytree(remote, folder, dirs_exist_ok=True),
        )
        served = Incumbent("found", version="v1", uri="s3://bucket/v1")
        other = dataclasses.replace(served, manifest_sha256="0" * 64)
        assert "is not the one that was registered" in bring(other)[0].why
        found, folder = bring(served)
        assert found == served
        assert folder is not None
        found, folder = bring(dataclasses.replace(served, sha256="of-another"))
        assert (found.state, folder) == ("unknown", None)
        assert "the registry says of-another" in found.why
        with (remote / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        found, folder = bring(served)
        assert (found.state, folder) == ("unknown", None)
        assert "model.safetensors has the sha256" in found.why
        assert "was changed after the upload" in found.why
        (remote / "model.safetensors").unlink()
        assert "model.safetensors is missing" in bring(served)[0].why


@pytest.mark.parametrize("uri", ["hf://owner/name", "/tmp/model", "file:///tmp/model", "pvc://a/b"])
def test_a_served_version_that_cannot_be_compared_gives_unknown(uri: str) -> None:
    found, folder = bring(Incumbent("found", version="v1", uri=uri), "m")
    assert (found.state, folder) == ("unknown", None)
    assert "nothing there can be compared" in found.why


def test_a_recipe_that_deploys_unverified_versions_compares_with_them_too(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "base_model: m\ndeploy: {unverified: [hf]}"
    settings = evaluate_settings(recipe)
    assert settings.unverified == ["hf"]
    assert evaluate_settings("base_model: m").unverified == []
    monkeypatch.setattr(base_model, "_from_hub", lambda *_: tiny_model)
    hub = Incumbent("found", version="v1", uri="hf://owner/name")
    assert bring(hub, "m", settings.unverified) == (hub, tiny_model)
