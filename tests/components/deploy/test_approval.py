"""A candidate waits for a person, on this machine and on KServe."""

import datetime
from dataclasses import replace
from typing import Any

import pytest

from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import note_properties
from nudge.components.common.core.errors import UserError
from nudge.components.deploy import approval
from nudge.components.deploy.deploy import decide, serve_approved
from nudge.components.deploy.kserve.approvals import PREFIX, PROBE, ClusterApprovals
from tests.admission import policy, refusal
from tests.components.deploy.kserve_cluster import ServingCluster
from tests.components.deploy.site import Site

BOTH = pytest.mark.parametrize("site", ["local", "kserve"], indirect=True)
MOSTLY_LOCAL = pytest.mark.parametrize(
    "site", ["local", pytest.param("kserve", marks=pytest.mark.long)], indirect=True
)
LOCAL = pytest.mark.parametrize("site", ["local"], indirect=True)
KSERVE = pytest.mark.parametrize("site", ["kserve"], indirect=True)
POLICY = policy("nudge-approvals")


@pytest.fixture
def waiting(site: Site, request: pytest.FixtureRequest) -> Site:
    """v1 is served, and "candidate" beat it and awaits approval."""
    if site.settings.target == "kserve":
        guard(request.getfixturevalue("cluster"))
    site.run("v1")
    site.settings = replace(site.settings, approval="required")
    site.evaluate("candidate")
    result = site.deploy("candidate")
    assert (result["promoted"], result["awaiting_approval"]) == (False, True)
    return site


def guard(cluster: ServingCluster) -> None:
    """Put the policy into force."""
    api = cluster.api
    api.admit = lambda operation, body: (
        refusal(POLICY, operation, body, api.user, api.may) if body["kind"] == "ConfigMap" else ""
    )


@pytest.fixture
def alice(site: Site, request: pytest.FixtureRequest) -> None:
    """On a cluster, the requests come from Alice, who may approve and promote."""
    if site.settings.target == "kserve":
        cluster = request.getfixturevalue("cluster")
        cluster.api.act_as("alice", "nudge-approver", "nudge-runner")


def properties(site: Site, version: str = "candidate") -> dict[str, Any]:
    return site.version(version).properties


@BOTH
def test_a_candidate_waits_and_is_served_when_it_is_approved(waiting: Site, alice: None) -> None:
    assert waiting.weights() == {"v1": 100}
    found = properties(waiting)
    assert (found["approval"], found["promoted"]) == ("awaiting", False)
    assert f"`nudge approve candidate --model {waiting.model}`" in found["not_promoted"]
    since = found["approval_at"]
    assert waiting.deploy("candidate")["awaiting_approval"], "a retry of the step waits too"
    assert properties(waiting)["approval_at"] == since
    with pytest.raises(UserError, match="is not served: awaiting approval"):
        serve_approved(waiting.settings, registered_model=waiting.model, version="candidate")

    decision = decide(waiting.settings, waiting.model, "candidate", "approved", "reads well")
    assert waiting.weights() == {"v1": 100}, "a decision alone moves nothing"
    serve_approved(waiting.settings, registered_model=waiting.model, version="candidate")
    assert waiting.weights() == {"candidate": 100}
    found = properties(waiting)
    assert (found["approval"], found["promoted"], found["not_promoted"]) == ("approved", True, "")
    assert found["approval_evidence"] == approval.evidence_of(waiting.version("candidate"))
    assert (found["approval_by"], found["approval_reason"]) == (decision.by, "reads well")
    assert datetime.datetime.fromisoformat(found["approval_at"]).tzinfo
    if waiting.settings.target == "kserve":
        assert decision.by == "alice"


@MOSTLY_LOCAL
def test_a_rejected_candidate_is_archived_and_stays_rejected(waiting: Site, alice: None) -> None:
    for _ in range(2):  # repeating it is harmless
        decide(waiting.settings, waiting.model, "candidate", "rejected", "wrong language")
    assert waiting.version("candidate").archived
    reason = properties(waiting)["not_promoted"]
    assert reason.startswith("rejected by")
    assert reason.endswith(": wrong language")
    with pytest.raises(UserError, match="was rejected by"):
        decide(waiting.settings, waiting.model, "candidate", "approved")
    assert waiting.deploy("candidate")["promoted"] is False
    assert waiting.weights() == {"v1": 100}


@LOCAL
def test_an_approval_does_not_replace_the_comparison_with_the_version_in_traffic(
    waiting: Site,
) -> None:
    decide(waiting.settings, waiting.model, "candidate", "approved")
    waiting.register("v2", {})
    waiting.serve(v2=100)
    with pytest.raises(UserError, match="candidate was compared with v1, but v2 has the traffic"):
        serve_approved(waiting.settings, registered_model=waiting.model, version="candidate")
    assert waiting.weights() == {"v2": 100}


@LOCAL
def test_an_approval_is_for_one_evaluation(waiting: Site) -> None:
    decide(waiting.settings, waiting.model, "candidate", "approved")
    changed = note_properties(waiting.version("candidate").id, {"evaluation_sha256": "another"})
    with_registry(waiting.registry, changed)
    with pytest.raises(UserError, match="its evaluation or files have changed since"):
        serve_approved(waiting.settings, registered_model=waiting.model, version="candidate")
    assert waiting.weights() == {"v1": 100}


@LOCAL
def test_candidates_that_can_no_longer_be_approved_are_archived(waiting: Site) -> None:
    waiting.evaluate("other")
    waiting.deploy("other")
    decide(waiting.settings, waiting.model, "other", "approved")
    serve_approved(waiting.settings, registered_model=waiting.model, version="other")
    found = waiting.version("candidate")
    assert (found.archived, found.properties["approval"]) == (True, "expired")
    assert "it was compared with v1, and other is served now" in found.properties["not_promoted"]

    waiting.evaluate("late")
    waiting.deploy("late")
    long_ago = "2026-01-01T00:00:00+00:00"
    with_registry(
        waiting.registry, note_properties(waiting.version("late").id, {"approval_at": long_ago})
    )
    with pytest.raises(UserError, match="nobody approved it within 14 days"):
        decide(waiting.settings, waiting.model, "late", "approved")
    assert waiting.version("late").archived
    assert waiting.weights() == {"other": 100}


@LOCAL
def test_a_promoted_version_is_never_archived_as_expired(waiting: Site) -> None:
    waiting.serve(candidate=100)  # by hand
    waiting.settings = replace(waiting.settings, approval="none")
    waiting.run("next")
    old = approval.archive_expired(
        lambda work: with_registry(waiting.registry, work), waiting.model, 0.0
    )
    assert old == []


@LOCAL
def test_a_version_that_does_not_wait_cannot_be_decided(site: Site) -> None:
    site.run("v1")
    with pytest.raises(UserError, match="v1 does not await approval"):
        decide(site.settings, site.model, "v1", "approved")


@KSERVE
def test_nobody_approves_in_another_name(waiting: Site, cluster: ServingCluster) -> None:
    """As an approver, as somebody else who may create ConfigMaps, and as the runner itself."""
    api = cluster.api
    version = waiting.version("candidate")
    with pytest.raises(UserError, match="only an account with the Role nudge-approver decides"):
        decide(waiting.settings, waiting.model, "candidate", "approved")
    api.act_as("alice", "nudge-approver")
    made = ClusterApprovals(cluster_of(cluster))
    made._cluster.user = lambda: "bob"  # type: ignore[method-assign]
    with pytest.raises(UserError, match="a decision must name the account that makes it"):
        made.decide(version, "approved", "")
    assert api.all("ConfigMap") == []
    decide(waiting.settings, waiting.model, "candidate", "approved")
    (found,) = api.all("ConfigMap")
    assert found["metadata"]["name"].startswith(PREFIX)
    assert (found["immutable"], found["data"]["who"]) == (True, "alice")
    api.act_as("bob", "nudge-approver")
    with pytest.raises(UserError, match="was approved by alice"):
        decide(waiting.settings, waiting.model, "candidate", "rejected")


@KSERVE
def test_no_decision_counts_where_the_policy_is_not_in_force(
    waiting: Site, cluster: ServingCluster
) -> None:
    api = cluster.api
    api.act_as("alice", "nudge-approver", "nudge-runner")
    decide(waiting.settings, waiting.model, "candidate", "approved")
    api.admit = lambda operation, body: ""
    with pytest.raises(UserError, match="the policy nudge-approvals is not in force"):
        serve_approved(waiting.settings, registered_model=waiting.model, version="candidate")
    assert waiting.weights() == {"v1": 100}
    assert len(api.all("ConfigMap")) == 1, "the attempt to forge one is a dry run"
    api.add({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": PROBE}})
    with pytest.raises(UserError, match="the policy nudge-approvals is not in force"):
        ClusterApprovals(cluster_of(cluster)).check_guarded()


@KSERVE
@pytest.mark.long
def test_a_config_map_that_is_no_decision_is_refused(
    waiting: Site, cluster: ServingCluster
) -> None:
    name = f"{PREFIX}{approval.evidence_of(waiting.version('candidate'))[:32]}"
    cluster.api.add(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name},
            "data": {"decision": "approved", "who": "alice"},
        }
    )
    with pytest.raises(UserError, match="is no decision that `nudge approve`"):
        serve_approved(waiting.settings, registered_model=waiting.model, version="candidate")
    assert waiting.weights() == {"v1": 100}


def cluster_of(cluster: ServingCluster) -> Any:
    from nudge.components.common.clients.kube import connect

    return connect(cluster.api.namespace)
