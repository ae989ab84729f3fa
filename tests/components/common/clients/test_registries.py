"""Every registry does the same: the embedded Kubeflow registry and a real MLflow server.

The tests run what the steps run: `enter` of register, and the work of `releases`.
"""

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.registry.connection import (
    Unreachable,
    registry_url,
    with_registry,
)
from nudge.components.common.clients.registry.copying import copy_models
from nudge.components.common.clients.registry.lookup import list_models
from nudge.components.common.clients.registry.releases import (
    Served,
    archive,
    archive_older,
    find_served,
    find_standing,
    find_version,
    list_versions,
    note_promotion,
    note_served,
    unneeded,
)
from nudge.components.common.clients.registry.rollbacks import (
    Rollback,
    find_rollback,
    note_rollback,
)
from nudge.components.common.core.errors import UserError
from nudge.components.common.local.processes import free_port
from nudge.components.register.entry import Registration, enter
from tests.local_registry import running_registry
from tests.mlflow_server import mlflow_server

KINDS = ("kubeflow", "mlflow")
PROPERTIES: dict[str, Any] = {
    "run_id": "run-1",
    "promoted": True,
    "seed": 7,
    "bytes": 12_345_678_901,
    "difference_bits_per_byte": -0.125,
    "empty": "",
    "train.epochs": 3.0,
    "expected_next": '[{"prompt": "Tür", "token": " auf"}]' + " " * 3000,
}
ENTRY = Registration(
    model_name="m",
    version="v1",
    uri="s3://nudge/models/m/v1",
    run_id="run-1",
    author="ann",
    description="m v1: better by 0.125",
    group="team",
    registry_name="registry",
    properties=PROPERTIES,
)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home: Path = tmp_path_factory.mktemp("registry")
    with running_registry(home) as address:
        yield address


@pytest.fixture(scope="module")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield f"mlflow+{url}"


@pytest.fixture(params=["kubeflow", pytest.param("mlflow", marks=pytest.mark.long)])
def url(request: pytest.FixtureRequest) -> str:
    name = {"kubeflow": "registry", "mlflow": "mlflow_url"}[request.param]
    return str(request.getfixturevalue(name))


def entry(model: str, version: str, **changes: Any) -> Registration:
    run_id = changes.pop("run_id", f"run-{version}")
    properties = {**PROPERTIES, "run_id": run_id}
    uri = f"s3://nudge/models/{model}/{version}"
    made = replace(ENTRY, model_name=model, version=version, uri=uri, run_id=run_id)
    return replace(made, properties=properties, **changes)


def serve(url: str, model: str, name: str, **values: Any) -> Served:
    served = Served(model, "http://127.0.0.1:9", {name: 100}, **values)
    version = with_registry(url, find_version(model, name))
    with_registry(url, note_served(version, served, "team", "vllm"))
    return served


def test_a_version_comes_back_as_it_was_registered(url: str) -> None:
    first = enter(url, entry("back", "v1"))
    again = enter(url, entry("back", "v1"))
    assert (again["version_id"], again["registered_model_id"]) == (
        first["version_id"],
        first["registered_model_id"],
    )
    found = with_registry(url, find_version("back", "v1"))
    assert (found.uri, found.archived) == ("s3://nudge/models/back/v1", False)
    assert found.created_ms > 1_700_000_000_000
    expected = {**PROPERTIES, "run_id": "run-v1"}
    assert found.properties == expected
    assert {key: type(value) for key, value in found.properties.items()} == {
        key: type(value) for key, value in expected.items()
    }
    (listed,) = with_registry(url, list_versions("back"))
    assert listed == found
    assert "back" in [model.name for model in with_registry(url, list_models)]


def test_a_name_belongs_to_one_run(url: str) -> None:
    enter(url, entry("taken", "v1", run_id="run-a"))
    with pytest.raises(UserError, match="registered already, by run 'run-a'"):
        enter(url, entry("taken", "v1", run_id="run-b"))
    with pytest.raises(UserError, match="no version 'v2' of taken; did you mean 'v1'"):
        with_registry(url, find_version("taken", "v2"))
    with pytest.raises(UserError, match="has no model 'nothing'"):
        with_registry(url, find_version("nothing", "v1"))


def test_what_is_served_is_recorded_and_can_be_rolled_back(url: str) -> None:
    for version in ("v1", "v2"):
        enter(url, entry("live", version))
    assert with_registry(url, find_served("live")) is None
    assert with_registry(url, find_served("nothing")) is None
    serve(url, "live", "v1")
    served = serve(url, "live", "v2", history=("v1", "v2"), withdrawn=("v0",))
    assert with_registry(url, find_served("live")) == served
    standing = with_registry(url, find_standing("live", "run-v2"))
    assert standing is not None
    assert standing[1] is not None
    assert standing[1].name == "v1"  # a resumed run is compared with the one before its own
    rollback = Rollback("run-9", "v1", {"v2": 100})
    with_registry(url, note_rollback("live", rollback))
    assert with_registry(url, find_rollback("live", "run-9")) == rollback
    assert with_registry(url, find_rollback("live", "run-8")) is None
    assert with_registry(url, find_served("live")) == served


def test_old_versions_are_archived_unless_they_are_needed(url: str) -> None:
    for version in ("v1", "v2", "v3", "v4"):
        enter(url, entry("old", version))
    serve(url, "old", "v4", history=("v1", "v4"))
    assert with_registry(url, archive_older("old", 1)) == ["v2", "v3"]
    states = {v.name: v.archived for v in with_registry(url, list_versions("old"))}
    assert states == {"v1": False, "v2": True, "v3": True, "v4": False}
    assert [v.name for v in with_registry(url, unneeded("old"))] == ["v2", "v3"]


def test_a_changed_property_leaves_the_others(url: str) -> None:
    enter(url, entry("noted", "v1"))
    version = with_registry(url, find_version("noted", "v1"))
    with_registry(url, note_promotion(version, "v0 is better"))
    changed = with_registry(url, find_version("noted", "v1")).properties
    expected = {**version.properties, "promoted": False, "not_promoted": "v0 is better"}
    assert changed == expected


def test_an_archived_version_stays_archived_when_a_property_changes(url: str) -> None:
    enter(url, entry("stays", "v1"))
    version = with_registry(url, find_version("stays", "v1"))
    with_registry(url, archive(version.id))
    with_registry(url, note_promotion(version, "v0 is better"))
    found = with_registry(url, find_version("stays", "v1"))
    assert (found.archived, found.properties["not_promoted"]) == (True, "v0 is better")


def test_what_cannot_be_stored_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="NUL"):
        enter(url, entry("bad", "v1", description="a", author="x\0y"))


@pytest.mark.long
@pytest.mark.parametrize(("source", "target"), [KINDS, KINDS[::-1]])
def test_versions_move_between_registries(
    request: pytest.FixtureRequest, source: str, target: str
) -> None:
    names = {"kubeflow": "registry", "mlflow": "mlflow_url"}
    one, other = (str(request.getfixturevalue(names[kind])) for kind in (source, target))
    model = f"moved-from-{source}-{secrets.token_hex(3)}"
    for version in ("v1", "v2", "v3"):
        enter(one, entry(model, version))
    serve(one, model, "v3", history=("v2", "v3"))
    with_registry(one, archive_older(model, 1))
    copied = copy_models(one, other, [model])
    assert copied == {model: ["v1", "v2", "v3"]}
    assert copy_models(one, other, [model]) == {model: []}  # nothing is left to do
    before = with_registry(one, list_versions(model))
    after = with_registry(other, list_versions(model))
    assert [(v.name, v.uri, v.archived, v.properties) for v in before] == [
        (v.name, v.uri, v.archived, v.properties) for v in after
    ]
    assert with_registry(other, find_served(model)) == with_registry(one, find_served(model))


def test_the_url_of_an_mlflow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry_url("mlflow+https://host/base/") == "mlflow+https://host/base"
    with pytest.raises(UserError, match=r"mlflow\+https://HOST for MLflow's registry"):
        registry_url("mlflow://host")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret-canary")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_TOKEN would be sent to http") as caught:
        with_registry("mlflow+http://127.0.0.1:9", list_models)
    assert "secret-canary" not in str(caught.value)


def test_an_mlflow_server_that_is_down_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Unreachable, match="does not answer"):
        with_registry(f"mlflow+http://127.0.0.1:{free_port()}", list_models, attempts_s=0.5)


@pytest.mark.long
def test_other_programs_see_the_version_and_the_served_one(mlflow_url: str, tmp_path: Path) -> None:
    import mlflow

    enter(mlflow_url, entry("seen", "v1"))
    serve(mlflow_url, "seen", "v1")
    client = mlflow.MlflowClient(mlflow_url.removeprefix("mlflow+"))
    found = client.get_model_version_by_alias("seen", "served")
    assert found.source == "s3://nudge/models/seen/v1"
    assert found.tags["difference_bits_per_byte"] == "-0.125"
    client.create_model_version("seen", "s3://elsewhere/model")  # registered without nudge
    names = [v.name for v in with_registry(mlflow_url, list_versions("seen"))]
    assert names == ["v1"]
