"""The cluster that will serve the model: it has KServe, and this account may use it."""

from nudge.components.common.clients.kube import connect
from nudge.components.common.clients.kube_requests import PATIENCE_S
from nudge.components.common.core.errors import UserError

KSERVE = "serving.kserve.io"
NEEDED = (
    ("create", KSERVE, "inferenceservices"),
    ("patch", KSERVE, "inferenceservices"),
    ("create", "coordination.k8s.io", "leases"),
    ("list", "", "pods"),
)
"""What a deployment always needs; Routes and HTTPRoutes depend on the cluster."""


def check_serving(namespace: str = "", patience_s: float = PATIENCE_S) -> None:
    """Ask the cluster whether this account may deploy a model in a namespace.

    An empty one is that of the kubeconfig or the pod. Raises `UserError` if the cluster does not
    answer, has no KServe, or denies a permission.
    """
    cluster = connect(namespace, patience_s)
    if not cluster.preferred_version(KSERVE):
        raise UserError(
            "deploy.target: kserve: this cluster has no KServe (the API group serving.kserve.io); "
            "install it, as OpenShift AI does, or set deploy.target: local"
        )
    denied = [f"{verb} {resource}" for verb, group, resource in NEEDED
              if not cluster.may(verb, group, resource)]  # fmt: skip
    if denied:
        raise UserError(
            f"deploy.target: kserve: this account may not {', '.join(denied)} in the namespace "
            f"{cluster.namespace}; ask for the role nudge-runner there (manifests/base/access.yaml)"
        )
