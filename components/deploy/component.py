from kfp import dsl
from nudge.components.common.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def deploy(recipe: str, registered_model: str, version: str) -> str:
    """Serve a registered version and ask it for a completion.

    Args:
        recipe: The recipe, as YAML text or a URI.
        registered_model: The name in the registry.
        version: The version's name in the registry.

    Returns:
        The endpoint's URL.
    """
    from nudge.components.common.recipe import step_settings
    from nudge.components.common.step import clean_end
    from nudge.components.deploy.deploy import deploy
    from nudge.components.deploy.settings import DeploySettings

    with clean_end():
        settings = step_settings(DeploySettings, "deploy", recipe)
        result = deploy(settings, registered_model=registered_model, version=version)
    return str(result["endpoint"])
