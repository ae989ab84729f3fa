"""Approvals on a cluster: one immutable ConfigMap per decision, guarded by the API server.

Kubernetes records who created an object in no field of it: ``managedFields`` has the name that the
client chose for itself, and only the audit log has the user. So the person's name is in the
object's data, and the ValidatingAdmissionPolicy ``nudge-approvals`` (manifests/cluster-admin)
admits the object only if that name is the one that the API server authenticated, and only from an
account whose Role has the verb ``create`` on ``approvals.nudge``. The time is the object's
``creationTimestamp``, which the API server sets.

Where the policy is not in force, anybody who may create ConfigMaps could write any name. `find`
therefore tries to forge a decision first (a dry run, which stores nothing) and believes no
decision unless the policy refuses the attempt. It does not notice a ConfigMap that somebody forged
before the policy came into force.
"""

from typing import Any

from nudge.components.common.artifacts.approval import Approval, State
from nudge.components.common.clients.kube import Cluster, ResourceConflict, ResourceKind
from nudge.components.common.clients.registry.releases import Version
from nudge.components.common.core.environment import OWNED_LABEL
from nudge.components.common.core.errors import UserError
from nudge.components.deploy.approval import DECISIONS, already_decided, evidence_of

CONFIG_MAP = ResourceKind("v1", "ConfigMap", "configmaps")
PREFIX = "nudge-approval-"
"""The policy guards every ConfigMap whose name begins so."""
POLICY = "nudge-approvals"
PROBE = f"{PREFIX}probe"


class ClusterApprovals:
    """Decisions as ConfigMaps in one namespace."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def find(self, version: Version) -> Approval | None:
        """As in `Approvals`; raises `UserError` if the decision could be a forgery."""
        evidence = evidence_of(version)
        found = self._cluster.get(CONFIG_MAP, _object_name(evidence))
        if found is None:
            return None
        self.check_guarded()
        data = found.get("data") or {}
        sound = found.get("immutable") and data.get("decision") in DECISIONS and data.get("who")
        if not sound or data.get("evidence") != evidence:
            raise UserError(
                f"the ConfigMap {_object_name(evidence)} in namespace {self._cluster.namespace} is "
                "no decision that `nudge approve` or `nudge reject` wrote; delete it and decide "
                "again"
            )
        when = str(found["metadata"]["creationTimestamp"]).replace("Z", "+00:00")
        return Approval(data["decision"], data["who"], when, evidence, data.get("reason", ""))

    def decide(self, version: Version, state: State, reason: str) -> Approval:
        """As in `Approvals`; the API server accepts the first decision about a version only."""
        self.check_guarded()
        evidence = evidence_of(version)
        body = _body(_object_name(evidence), state, self._cluster.user())
        body["data"] |= {
            "model": version.model,
            "version": version.name,
            "evidence": evidence,
            "reason": reason,
        }
        try:
            self._cluster.create(CONFIG_MAP, body)
        except ResourceConflict:
            decided = self.find(version)
            # The answer to an earlier attempt of the same request may have been lost.
            mine = decided and (decided.state, decided.by) == (state, body["data"]["who"])
            if decided and not mine:
                raise already_decided(version, decided) from None
        made = self.find(version)
        if made is None:
            raise UserError(
                f"the decision about {version.model} {version.name} was deleted; decide again"
            )
        return made

    def check_guarded(self) -> None:
        """Raise `UserError` unless the API server refuses a decision in somebody else's name."""
        forged = _body(PROBE, "approved", "somebody-else")
        try:
            self._cluster.create(CONFIG_MAP, forged, dry_run=True)
        except UserError as refused:
            if f"ValidatingAdmissionPolicy '{POLICY}'" in str(refused):
                return
            raise
        except ResourceConflict:  # somebody could create an object of this name
            pass
        raise UserError(
            f"anybody who may create ConfigMaps in namespace {self._cluster.namespace} could "
            f"approve in another person's name, because the policy {POLICY} is not in force there; "
            "a cluster administrator applies it: oc apply -k manifests/cluster-admin"
        )


def _object_name(evidence: str) -> str:
    return f"{PREFIX}{evidence[:32]}"


def _body(name: str, decision: str, who: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": dict(OWNED_LABEL)},
        "immutable": True,
        "data": {"decision": decision, "who": who},
    }
