"""Traffic that moves between a run's evaluation and its deploy, on this machine and on KServe."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.comparison import comparison_properties
from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import (
    Served,
    Version,
    find_served,
    find_version,
)
from nudge.components.common.core.errors import UserError
from nudge.components.deploy import traffic
from nudge.components.deploy.deploy import Moved, deploy, rollback, serve, still_before, unmoved
from nudge.components.deploy.local import gateway
from nudge.components.deploy.local.local_serving import LocalServing
from nudge.components.deploy.settings import DeploySettings
from nudge.components.evaluate.incumbent import find_incumbent
from nudge.pipelines.local import services
from tests.components.deploy.kserve_cluster import EXPECTED, PROMPT, SETTINGS
from tests.components.deploy.local_promote import quick_server


class Killed(BaseException):
    """Represents SIGKILL: no handler catches it to clean up."""


@dataclasses.dataclass
class Site:
    """A served model and the steps of its runs."""

    model: str
    registry: str
    settings: DeploySettings
    expected: list[dict[str, Any]]
    weights: Callable[[], dict[str, int]]

    def evaluate(self, version: str) -> None:
        """The steps of a run before deploy: find the incumbent and register a version.

        Here the candidate is always better than the incumbent.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NUDGE_RUN_ID", version)
            incumbent = find_incumbent(self.model, self.registry)
        assert incumbent.state in ("found", "none"), incumbent.why
        self.register(version, comparison_properties(incumbent))

    def register(self, version: str, properties: dict[str, str]) -> None:
        from model_registry import ModelRegistry

        ModelRegistry(self.registry, author="test", is_secure=False).register_model(
            self.model, f"s3://bucket/models/{self.model}/{version}", version=version,
            model_format_name="vLLM", model_format_version="1",
            metadata={
                "run_id": version, "promoted": True, **properties,
                "expected_next": json.dumps(self.expected),
            },
        )  # fmt: skip

    def deploy(self, version: str) -> dict[str, Any]:
        return deploy(self.settings, registered_model=self.model, version=version)

    def run(self, version: str) -> None:
        """A complete, undisturbed run."""
        self.evaluate(version)
        assert self.deploy(version)["promoted"] is True

    def serve(self, **shares: int) -> None:
        """The work of `nudge promote` and `nudge split`."""
        serve(self.settings, self.model, shares)

    def rollback(self) -> None:
        rollback(self.settings, registered_model=self.model)

    def served(self) -> Served:
        return with_registry(self.registry, find_served(self.model))

    def version(self, name: str) -> Version:
        return with_registry(self.registry, find_version(self.model, name))

    def refused(self, version: str) -> str:
        """Deploy a version that must not be promoted; returns the recorded reason."""
        before, weights = self.served(), self.weights()
        result = self.deploy(version)
        assert result["promoted"] is False
        assert self.weights() == weights == result["shares"]
        assert self.served() == before
        assert result["endpoint"] == (before.endpoint if before else "")
        properties = self.version(version).properties
        assert (properties["promoted"], properties["not_promoted"]) == (False, result["reason"])
        assert properties["run_id"] == version, "the other properties are kept"
        return str(result["reason"])


BOTH = pytest.mark.parametrize("site", ["local", "kserve"], indirect=True)
LOCAL = pytest.mark.parametrize(
    "site", ["local", pytest.param("kserve", marks=pytest.mark.long)], indirect=True
)
"""On KServe only in the long tests: the decision is the same code."""


@pytest.fixture
def site(
    request: pytest.FixtureRequest,
    home: Path,
    registry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    model = request.node.name.replace("_", "-").replace("[", "-").replace("]", "")[5:]
    monkeypatch.setenv("NUDGE_REGISTRY_URL", registry)
    monkeypatch.setenv("AWS_S3_BUCKET", "bucket")
    if request.param == "kserve":
        cluster = request.getfixturevalue("cluster")
        yield Site(model, registry, SETTINGS, EXPECTED, cluster.weights)
        return
    monkeypatch.setattr(LocalServing, "_fetch", lambda self, version: tmp_path)
    monkeypatch.setattr(LocalServing, "_serve", quick_server)

    def weights() -> dict[str, int]:
        route = gateway.routes(home).get(model)
        return route.shares if route else {}

    yield Site(model, registry, DeploySettings(smoke_prompt=PROMPT), [], weights)
    services.down(home)


@BOTH
def test_a_run_does_not_replace_a_version_it_was_not_compared_with(
    site: Site,
) -> None:
    site.run("v1")
    site.evaluate("better")
    site.evaluate("worse")
    assert site.deploy("better")["promoted"] is True
    reason = site.refused("worse")
    assert "worse was compared with v1, but better has the traffic now" in reason
    assert "run again to compare with better" in reason
    assert site.weights() == {"better": 100}
    site.run("next")
    assert site.weights() == {"next": 100}


@BOTH
def test_two_first_runs_at_once(site: Site) -> None:
    site.evaluate("first")
    site.evaluate("second")
    assert site.deploy("first")["promoted"] is True
    reason = site.refused("second")
    assert "second was compared with the base model, because no version was served then" in reason
    assert site.weights() == {"first": 100}


@LOCAL
def test_two_deploys_at_the_same_moment(site: Site) -> None:
    site.run("v1")
    results: dict[str, bool] = {}
    for version in ("a", "b"):
        site.evaluate(version)

    def deployed(version: str) -> None:
        results[version] = site.deploy(version)["promoted"]

    threads = [threading.Thread(target=deployed, args=(version,)) for version in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results.values()) == [False, True]
    assert site.weights() == {version: 100 for version, promoted in results.items() if promoted}


@BOTH
@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda site: site.serve(v3=100), "v3 has the traffic now"),
        (lambda site: site.rollback(), "v1 has the traffic now"),
        (lambda site: site.serve(v2=90, v3=10), "now split between v2 (90 %) and v3 (10 %)"),
    ],
    ids=["promote", "rollback", "split"],
)
def test_a_person_moves_the_traffic_during_a_run(
    site: Site, move: Callable[[Site], None], message: str
) -> None:
    site.run("v1")
    site.run("v2")
    site.register("v3", {})
    site.evaluate("candidate")
    move(site)
    reason = site.refused("candidate")
    assert "candidate was compared with v2" in reason
    assert message in reason
    assert f"`nudge promote candidate --model {site.model}` gives it the traffic anyway" in reason


@LOCAL
def test_a_split_is_not_ended_by_a_run(site: Site) -> None:
    """The run knows about the split, but its candidate was compared with the main version alone."""
    site.run("v1")
    site.register("v2", {})
    site.serve(v1=90, v2=10)
    site.evaluate("candidate")
    assert json.loads(site.version("candidate").properties["incumbent_traffic"]) == {
        "v1": 90, "v2": 10,
    }  # fmt: skip
    reason = site.refused("candidate")
    assert "the traffic is still split between v1 (90 %) and v2 (10 %); end the split" in reason
    site.serve(v1=100)
    assert site.deploy("candidate")["promoted"] is True


@LOCAL
def test_a_person_may_promote_a_refused_version(site: Site) -> None:
    site.run("v1")
    site.evaluate("a")
    site.evaluate("b")
    site.deploy("a")
    site.refused("b")
    site.serve(b=100)
    assert site.weights() == {"b": 100}
    properties = site.version("b").properties
    assert (properties["promoted"], properties["not_promoted"]) == (True, "")


@LOCAL
def test_a_deploy_can_be_repeated(site: Site) -> None:
    site.run("v1")
    site.evaluate("candidate")
    assert site.deploy("candidate")["promoted"] is True
    assert site.deploy("candidate")["promoted"] is True
    site.evaluate("other")
    site.rollback()
    reason = site.refused("candidate")
    assert "candidate had traffic before, and it was withdrawn" in reason
    assert site.weights() == {"v1": 100}


def kill_at(site: Site, at: str, patch: pytest.MonkeyPatch) -> None:
    """From now on, the process that does this dies before it."""

    def kill(*_: Any, **__: Any) -> Any:
        raise Killed

    where: Any = traffic if at == "note_served" else LocalServing
    if "kserve" in site.settings.target:
        from nudge.components.deploy.kserve.kserve import KServe

        where = traffic if at == "note_served" else KServe
    patch.setattr(where, at, kill)


@LOCAL
@pytest.mark.parametrize("at", ["bring_up", "move", "note_served", "retire"])
def test_a_killed_deploy_can_be_repeated_and_other_runs_are_refused(
    site: Site, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before ``at``. After the move, the registry has no record of it yet."""
    site.run("v1")
    site.evaluate("killed")
    site.evaluate("other")
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        kill_at(site, at, patch)
        site.deploy("killed")
        raise AssertionError("it was not killed")
    if at in ("note_served", "retire"):
        assert site.weights() == {"killed": 100}
        reason = site.refused("other")
        note = "(the registry still says v1: that move was interrupted)"
        assert (note in reason) == (at == "note_served")
        assert "killed has the traffic now" in reason
    assert site.deploy("killed")["promoted"] is True
    assert site.weights() == site.served().shares == {"killed": 100}
    assert "killed has the traffic now" in site.refused("other")


@LOCAL
def test_a_version_that_an_older_nudge_registered_is_deployed(site: Site) -> None:
    """It does not record what it was compared with."""
    site.run("v1")
    site.register("old", {})
    assert site.deploy("old")["promoted"] is True
    assert site.weights() == {"old": 100}


@LOCAL
def test_a_rollback_is_refused_if_a_run_deploys_meanwhile(site: Site) -> None:
    site.run("v1")
    site.run("v2")
    check = still_before("v1")
    site.run("v3")
    with pytest.raises(UserError, match="so a rollback no longer leads to v1"):
        serve(site.settings, site.model, {"v1": 100}, check=check)
    with pytest.raises(Moved):
        serve(site.settings, site.model, {"v2": 100}, check=unmoved({"v2": 100}))
    assert site.weights() == {"v3": 100}


@LOCAL
@pytest.mark.parametrize("stage", ["move", "note_served", "retire", ""])
def test_a_rollback_that_is_retried_goes_back_once(
    site: Site, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step ends before or after the traffic moved, or its pod is lost when all is done."""
    for version in ("v1", "v2", "v3"):
        site.run(version)
    monkeypatch.setenv("NUDGE_RUN_ID", "the-rollback")
    with monkeypatch.context() as patch:
        if stage:
            kill_at(site, stage, patch)
            with pytest.raises(Killed):
                site.rollback()
        else:
            site.rollback()
    site.rollback()
    assert site.weights() == {"v2": 100}
    assert site.served().main == "v2"
    monkeypatch.setenv("NUDGE_RUN_ID", "another-rollback")
    site.rollback()
    assert site.weights() == {"v1": 100}


@LOCAL
def test_a_retried_rollback_is_refused_if_others_moved_the_traffic(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("v1", "v2", "v3"):
        site.run(version)
    monkeypatch.setenv("NUDGE_RUN_ID", "the-rollback")
    site.rollback()
    site.serve(v1=50, v3=50)
    with pytest.raises(Moved):
        site.rollback()
    assert site.weights() == {"v1": 50, "v3": 50}
