"""Where a model is served, this machine or a cluster, and where its approvals are kept."""

import os

from nudge.components.common.clients.registry.releases import Served
from nudge.components.common.core.environment import in_pipeline_step, nudge_home
from nudge.components.common.core.errors import UserError
from nudge.components.common.local.guard import is_here
from nudge.components.deploy import approval
from nudge.components.deploy.settings import DeploySettings
from nudge.components.deploy.traffic import Target


def find_target(settings: DeploySettings, served: Served | None) -> Target:
    """What serves a model: this machine, or the cluster."""
    if target_name(settings, served) == "kserve":
        from nudge.components.common.clients.kube import connect
        from nudge.components.deploy.kserve.kserve import KServe

        return KServe(connect(settings.kserve.namespace), settings)
    from nudge.components.deploy.local import host_serving

    if url := os.environ.get(host_serving.URL):
        return host_serving.HostServing(url, os.environ[host_serving.TOKEN], settings)
    from nudge.components.deploy.local.local_serving import LocalServing

    return LocalServing(nudge_home(), settings)


def target_name(settings: DeploySettings, served: Served | None) -> str:
    """``local`` or ``kserve``; raises `UserError` if the target is local and that cannot work."""
    in_pod = in_pipeline_step()
    elsewhere = served is not None and not is_here(served.endpoint)
    if settings.target == "auto":
        return "kserve" if in_pod or elsewhere else "local"
    if settings.target == "local" and in_pod:
        raise UserError(
            "deploy.target is local, but a server that a step starts on a cluster stops with the "
            "step's pod; set deploy.target to kserve, or remove it"
        )
    if settings.target == "local" and served and elsewhere:
        raise UserError(
            f"deploy.target is local, but {served.model} is served at {served.endpoint}, which is "
            "not this machine: its users would stay there while the registry says otherwise; set "
            "the target to kserve, or remove it"
        )
    return settings.target


def find_approvals(settings: DeploySettings, served: Served | None) -> approval.Approvals:
    """Where the decisions about the candidates of a model are kept."""
    if target_name(settings, served) != "kserve":
        return approval.RegistryApprovals()
    from nudge.components.common.clients.kube import connect
    from nudge.components.deploy.kserve.approvals import ClusterApprovals

    return ClusterApprovals(connect(settings.kserve.namespace))
