"""Serve an approved version from the dashboard, as `nudge approve` does.

The dashboard does not tell a step who started its run, so this pipeline cannot approve anything. It
continues an approval that `nudge approve --no-deploy` recorded.
"""

from nudge.components.deploy.component import serve_approved
from nudge.pipelines.placement import StepResources, pipeline


@pipeline("deploy-approved", "Serve a version that a person approved.")
def deploy_approved(
    resources: StepResources,
    model_name: str,
    version: str,
    recipe: str = "package://nudge.pipelines.recipes/eiffel.yaml",
) -> None:
    """Check the approval and the traffic, start and test the version, and move the traffic.

    Args:
        model_name: The model, by its name in the registry.
        version: The version that a person approved.
        recipe: The recipe of the run that registered it, as YAML text or the URI of a file.
    """
    served = serve_approved(recipe=recipe, model_name=model_name, version=version)
    # It changes the world; a cached result would claim something that did not happen.
    resources.small.put("serve_approved", served).set_caching_options(False)
