"""Names, numbers and races in a registry with the rules of PostgreSQL or MariaDB."""

import asyncio
import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from nudge.components.common.clients.registry import connection as registry_module
from nudge.components.common.clients.registry.connection import Unreachable, with_registry
from nudge.components.common.clients.registry.lookup import (
    PARALLEL,
    find_environment,
    find_model,
    find_model_artifact,
)
from nudge.components.common.clients.registry.releases import (
    Served,
    archive,
    archive_older,
    find_served,
    find_version,
    list_versions,
    note_properties,
    note_served,
)
from nudge.components.common.core.errors import UserError
from nudge.components.register.entry import Registration, enter
from tests.registry_server import registry_server

API = "/api/model_registry/v1alpha3"


def entry(model: str, version: str, run: str = "run", **properties: Any) -> Registration:
    return Registration(
        model_name=model,
        version=version,
        uri=f"s3://b/{model}/{version}",
        run_id=run,
        author="me",
        description="",
        group="local",
        registry_name="model-registry",
        properties={"run_id": run, **properties},
    )


@pytest.fixture(params=["postgresql", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with registry_server(tmp_path, request.param) as url:
        yield url


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("t1-edge", "t1_edge"), ("Chat", "chat"), ("t1_edge", "t1-edge"), ("mü", "mu")],
)
def test_a_model_is_never_confused_with_another_one(url: str, theirs: str, ours: str) -> None:
    for version in ("v1", "v2"):
        enter(url, entry(theirs, version, run="theirs"))
    assert with_registry(url, lambda client: find_model(client, ours)) is None
    assert with_registry(url, find_served(ours)) is None
    for work in (list_versions(ours), archive_older(ours, 1), find_version(ours, "v1")):
        with pytest.raises(UserError, match="the registry has no model"):
            with_registry(url, work)
    with pytest.raises(UserError, match=f"confuse the new model '{ours}' with the existing model"):
        enter(url, entry(ours, "v1"))
    assert [each.archived for each in with_registry(url, list_versions(theirs))] == [False, False]


def test_versions_that_a_lookup_cannot_distinguish_are_both_found(url: str) -> None:
    model_id = enter(url, entry("m", "v1-0"))["registered_model_id"]
    with pytest.raises(
        UserError, match="confuse the new version 'v1_0' with the existing version 'v1-0'"
    ):
        enter(url, entry("m", "v1_0"))
    # Other programs registered it, and a name with a backslash, which no lookup finds.
    for name in ("v1_0", "v\\d"):
        body = {"name": name, "registeredModelId": model_id}
        version = httpx.post(f"{url}{API}/model_versions", json=body).json()["id"]
        artifact = {"artifactType": "model-artifact", "name": "m", "uri": f"s3://{name}"}
        httpx.post(f"{url}{API}/model_versions/{version}/artifacts", json=artifact)
    for name in ("v1_0", "v1-0", "v\\d"):
        assert with_registry(url, find_version("m", name)).name == name


def test_models_that_a_lookup_cannot_distinguish_are_both_found(url: str) -> None:
    enter(url, entry("t1-edge", "v1"))
    # Another program registered it. The server answers "not found" for more than one match.
    httpx.post(f"{url}{API}/registered_models", json={"name": "t1_edge"}).raise_for_status()
    for name in ("t1_edge", "t1-edge"):
        model = with_registry(url, partial(find_model, name=name))
        assert model is not None
        assert model.name == name


def test_the_artifact_of_a_version_is_the_one_named_after_the_model(url: str) -> None:
    """Without one of that name, the only one counts."""
    body = {"name": "v1", "registeredModelId": enter(url, entry("m", "v0"))["registered_model_id"]}
    version = httpx.post(f"{url}{API}/model_versions", json=body).json()["id"]

    async def uri(client: Any) -> str | None:
        found = await find_model_artifact(client, version, "m")
        return found.uri if found else None

    for name, expected in (("tokenizer", "s3://tokenizer"), ("logs", None), ("m", "s3://m")):
        body = {"artifactType": "model-artifact", "name": name, "uri": f"s3://{name}"}
        path = f"{url}{API}/model_versions/{version}/artifacts"
        httpx.post(path, json=body).raise_for_status()
        assert with_registry(url, uri) == expected


@pytest.mark.parametrize("name", ["", " m", "m\n", "a\0b", "n" * 245, "x\u2028y"])
def test_a_name_that_the_registry_cannot_store_is_rejected(tmp_path: Path, name: str) -> None:
    with registry_server(tmp_path) as url, pytest.raises(UserError, match="the name"):
        with_registry(url, find_version(name, "v1"))


def test_the_longest_name_fits_everywhere(url: str) -> None:
    name = "n" * 244
    enter(url, entry(name, name))
    version = with_registry(url, find_version(name, name))
    served = Served(name, "http://x", {name: 100})
    with_registry(url, note_served(version, served, "env", "vllm"))
    assert with_registry(url, find_served(name)) == served


def test_numbers_are_returned_unchanged(url: str) -> None:
    numbers = {
        "seed": 12345678901,
        "negative": -(10**9),
        "nine_digits": 999_999_999,
        "train.clip_norm": math.inf,
        "loss": math.nan,
        "rate": 0.1,
        "promoted": True,
        "digits": "12345678901",
    }
    enter(url, entry("m", "v1", run="20261130121212", **numbers))
    found = with_registry(url, find_version("m", "v1")).properties
    assert math.isnan(found.pop("loss"))
    assert found == {
        "run_id": "20261130121212",
        **{key: value for key, value in numbers.items() if key != "loss"},
    }
    assert [type(found[key]) for key in ("seed", "train.clip_norm", "digits")] == [int, float, str]
    enter(url, entry("m", "v1", run="20261130121212", **numbers))  # the same run


def test_unreadable_entries_of_others_do_not_hide_the_rest(url: str, tmp_path: Path) -> None:
    enter(url, entry("m", "v1", loss=0.5))
    enter(url, entry("m", "v2", loss=0.5))
    database = sqlite3.connect(tmp_path / "registry.sqlite")
    poisoned = '"loss": {"double_value": Infinity, "metadataType": "MetadataDoubleValue"}'
    large = '"n": {"int_value": "2147483647", "metadataType": "MetadataIntValue"}'
    kept = json.dumps({"name": "v1", "registeredModelId": "1", "state": "LIVE"})[:-1]
    body = f'{kept}, "customProperties": {{{poisoned}, {large}}}}}'
    with database:
        database.execute("UPDATE entity SET body = ? WHERE name = 'v1'", (body,))
    database.close()
    answer = httpx.get(f"{url}{API}/model_versions")
    assert answer.status_code == 200
    assert "Infinity" not in answer.text
    first, second = with_registry(url, list_versions("m"))
    assert first.properties == {"n": 2147483647}
    assert second.properties["loss"] == 0.5


def test_a_listing_reads_what_a_lookup_reads(url: str) -> None:
    """The listing parses the registry's JSON itself; every type of property comes out the same."""
    values: dict[str, Any] = {
        "loss": 0.5,
        "steps": 7,
        "big": 20261130121212,
        "promoted": True,
        "note": "é",
        "x": 2.0,
    }
    enter(url, entry("m", "v1", **values))
    looked_up = with_registry(url, find_version("m", "v1"))
    (listed,) = with_registry(url, list_versions("m"))
    assert listed == looked_up
    assert {name: listed.properties[name] for name in values} == values
    assert [type(listed.properties[name]) for name in values] == [type(v) for v in values.values()]


def test_nothing_is_sent_that_the_registry_cannot_store(tmp_path: Path) -> None:
    asked: list[str] = []
    with registry_server(tmp_path, around=_noting(asked)) as url:
        enter(url, entry("m", "v0"))
        asked.clear()
        for properties, said in (
            ({"k" * 256: 1}, "the name of the property 'kkk"),
            ({"note": "a\0b"}, "customProperties.note.string_value contains a NUL"),
            ({"note": "x" * 16_777_216}, "customProperties.note.string_value has 16777216 bytes"),
            ({"note": "\ud800"}, "half a surrogate pair"),
        ):
            with pytest.raises(UserError, match=said) as refused:
                enter(url, entry("m", "v1", **properties))
            assert not isinstance(refused.value, Unreachable)
        assert not [each for each in asked if each.startswith("POST")]


def test_a_persistent_500_is_not_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "error saving registered model: ERROR: value too long for type character varying(255) "
        "(SQLSTATE 22001)"
    )
    asked: list[str] = []

    def failing(app: Any) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            body = json.dumps({"code": "Internal Server Error", "message": message}).encode()
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 500, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        return _noting(asked)(answer)

    with registry_server(tmp_path, around=failing) as url:
        with pytest.raises(UserError, match="SQLSTATE 22001") as refused:
            enter(url, entry("m", "v1"))
        assert not isinstance(refused.value, Unreachable)
        assert len([each for each in asked if each.startswith("POST")]) == 1
        # The same status is retried if its reason may be temporary.
        message = "error saving registered model: connection refused"
        monkeypatch.setattr(registry_module, "ATTEMPTS_S", 1.0)
        with pytest.raises(Unreachable):
            enter(url, entry("m", "v1"))


def test_simultaneous_first_registrations_all_succeed(tmp_path: Path) -> None:
    """Every process looks up model, version and artifact before any process creates one."""
    waiting = _together({"registered_model": 6, "model_version": 6, "artifacts": 2})
    runs = [("v1", "a"), ("v2", "b"), ("v3", "c"), ("v4", "d"), ("v5", "e"), ("v5", "e")]
    with registry_server(tmp_path, around=waiting) as url, ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda each: enter(url, entry("m", *each)), runs))
        assert len({each["registered_model_id"] for each in made}) == 1
        assert len({each["version_id"] for each in made}) == 5
        found = with_registry(url, list_versions("m"))
        assert sorted(each.name for each in found) == ["v1", "v2", "v3", "v4", "v5"]
        for each in found:
            artifacts = httpx.get(f"{url}{API}/model_versions/{each.id}/artifacts").json()
            assert artifacts["size"] == 1


def test_simultaneous_first_deployments_both_succeed(tmp_path: Path) -> None:
    waiting = _together({"inference_services": 2, "serving_environment": 2})
    with registry_server(tmp_path, around=waiting) as url, ThreadPoolExecutor(2) as pool:
        enter(url, entry("m", "v1"))
        version = with_registry(url, find_version("m", "v1"))
        served = Served("m", "http://x", {"v1": 100}, ("v1",))
        work = note_served(version, served, "env", "vllm")
        list(pool.map(lambda _: with_registry(url, work), range(2)))
        assert with_registry(url, find_served("m")) == served


def test_environments_and_services_of_others_are_not_taken(url: str) -> None:
    """A lookup of `team_a` returns the environment `team-a`, and in MariaDB also `TEAM_A`."""
    model_id = enter(url, entry("m", "v1"))["registered_model_id"]
    body = {"name": "team-a"}
    environment = httpx.post(f"{url}{API}/serving_environments", json=body).json()["id"]
    assert with_registry(url, lambda client: find_environment(client, "team_a")) is None
    found = with_registry(url, lambda client: find_environment(client, "team-a"))
    assert found is not None
    assert found.id == environment
    shares = {"metadataType": "MetadataStringValue", "string_value": '{"v9": 100}'}
    service = {
        "name": "m-mirror",
        "registeredModelId": model_id,
        "servingEnvironmentId": environment,
        "customProperties": {"shares": shares, "endpoint": shares, "history": shares},
    }
    httpx.post(f"{url}{API}/inference_services", json=service).raise_for_status()
    assert with_registry(url, find_served("m")) is None


def test_a_note_on_an_archived_version_leaves_it_archived(url: str) -> None:
    """The server sets a version to LIVE if an update names no state."""
    version_id = enter(url, entry("m", "v1"))["version_id"]
    with_registry(url, archive(version_id))
    with_registry(url, note_properties(version_id, {"note": "kept"}))
    found = with_registry(url, find_version("m", "v1"))
    assert (found.archived, found.properties["note"]) == (True, "kept")


@pytest.mark.parametrize("spoken", ["v1alpha3", "v1"])
def test_the_api_version_is_the_servers(tmp_path: Path, spoken: str) -> None:
    asked: list[str] = []
    with registry_server(tmp_path, versions=(spoken,), around=_noting(asked)) as url:
        enter(url, entry("m", "v1"))
        version = with_registry(url, find_version("m", "v1"))
        served = Served("m", "http://x", {"v1": 100}, ("v1",))
        for _ in range(2):  # created, then changed
            with_registry(url, note_served(version, served, "env", "vllm"))
        assert with_registry(url, find_served("m")) == served
        enter(url, entry("m", "v2"))
        enter(url, entry("m", "v3"))
        assert with_registry(url, archive_older("m", 1)) == ["v2"]
        other = [each for each in asked if f"/{spoken}/" not in each]
        assert len(other) <= 1  # the first request


def test_a_listing_uses_a_few_connections_rather_than_one_per_version(tmp_path: Path) -> None:
    peers: set[Any] = set()

    def noting(app: Any) -> Any:
        async def note(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                peers.add(scope["client"])
            await app(scope, receive, send)

        return note

    with registry_server(tmp_path, around=noting) as url:
        model_id = enter(url, entry("m", "v0"))["registered_model_id"]
        database = sqlite3.connect(tmp_path / "registry.sqlite")
        with database:  # one transaction, because 458 requests would each wait for the disk
            for number in range(1, 230):
                _insert(database, "model_versions", int(model_id), f"v{number}")
                (version,) = database.execute("SELECT last_insert_rowid()").fetchone()
                _insert(database, "model-artifact", version, "m")
        database.close()
        peers.clear()
        begun = time.perf_counter()
        found = with_registry(url, list_versions("m"))
        seconds = time.perf_counter() - begun
    print(f"230 versions in {seconds:.2f} s")  # 0.6 s of CPU in this process
    assert [each.name for each in found] == [f"v{number}" for number in range(230)]
    assert len(peers) <= PARALLEL


def _insert(database: sqlite3.Connection, kind: str, parent: int, name: str) -> None:
    body = {"name": name, "uri": "s3://b", "artifactType": "model-artifact"}
    if kind == "model_versions":
        body = {"name": name, "registeredModelId": str(parent), "state": "LIVE"}
    database.execute(
        "INSERT INTO entity (kind, parent, name, body, created, updated) VALUES (?, ?, ?, ?, 1, 1)",
        (kind, parent, name, json.dumps(body)),
    )


def _noting(asked: list[str]) -> Callable[[Any], Any]:
    """Records the method and path of each request."""

    def around(app: Any) -> Any:
        async def note(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                asked.append(f"{scope['method']} {scope['path']}")
            await app(scope, receive, send)

        return note

    return around


def _together(numbers: dict[str, int]) -> Callable[[Any], Any]:
    """Delays the first lookups per last path segment until that many have arrived."""
    arrived = dict.fromkeys(numbers, 0)
    guard = threading.Lock()

    def around(app: Any) -> Any:
        async def wait(scope: Any, receive: Any, send: Any) -> None:
            part = scope["path"].rpartition("/")[2] if scope["type"] == "http" else ""
            if part in numbers and scope["method"] == "GET" and arrived[part] < numbers[part]:
                messages: list[Any] = []

                async def hold(message: Any) -> None:
                    messages.append(message)

                await app(scope, receive, hold)
                with guard:
                    arrived[part] += 1
                for _ in range(1000):
                    if arrived[part] >= numbers[part]:
                        break
                    await asyncio.sleep(0.01)
                for message in messages:
                    await send(message)
                return
            await app(scope, receive, send)

        return wait

    return around
