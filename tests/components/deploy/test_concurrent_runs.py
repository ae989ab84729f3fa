"""Traffic that moves between a run's evaluation and its deploy, on this machine and on KServe."""

import contextlib
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.deploy import traffic
from nudge.components.deploy.deploy import serve
from nudge.components.deploy.local.local_serving import LocalServing
from nudge.components.deploy.way_back import Moved, still_before, unmoved
from tests.components.deploy.site import Site


class Killed(BaseException):
    """Represents SIGKILL: no handler catches it to clean up."""


BOTH = pytest.mark.parametrize("site", ["local", "kserve"], indirect=True)
LOCAL = pytest.mark.parametrize(
    "site", ["local", pytest.param("kserve", marks=pytest.mark.long)], indirect=True
)
"""On KServe only in the long tests: the decision is the same code."""


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
@pytest.mark.parametrize(
    "stage",
    [
        "note_served",
        "",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("move", "retire")),
    ],
)
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
