from kfp import dsl

from nudge.components.common.core.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def deploy(recipe: str, registered_model: str, version: str) -> str:
    """Serve a registered version and ask it for a completion.

    If the version it was compared with no longer has the traffic, it gets none.

    Args:
        recipe: The recipe, as YAML text or a URI.
        registered_model: The name in the registry.
        version: The version's name in the registry.

    Returns:
        The URL of the model's endpoint.
    """
    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.deploy.deploy import deploy
    from nudge.components.deploy.settings import deploy_settings

    with exit_with_user_errors():
        settings = deploy_settings(recipe)
        result = deploy(settings, registered_model=registered_model, version=version)
    return str(result["endpoint"])


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def serve_approved(recipe: str, model_name: str, version: str) -> str:
    """Serve a version that a person approved, after the same checks as in `deploy`.

    Args:
        recipe: The recipe, as YAML text or a URI; its section `deploy` says where to serve.
        model_name: The name in the registry.
        version: The version that a person approved with `nudge approve`.

    Returns:
        The URL of the model's endpoint.
    """
    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.deploy.deploy import serve_approved
    from nudge.components.deploy.settings import deploy_settings

    with exit_with_user_errors():
        settings = deploy_settings(recipe)
        result = serve_approved(settings, registered_model=model_name, version=version)
    return str(result["endpoint"])


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def roll_back(recipe: str, model_name: str, to_version: str) -> str:
    """Return all of a model's traffic to a version that had it before.

    Args:
        recipe: The recipe, as YAML text or a URI; its section `deploy` says where to serve.
        model_name: The name in the registry.
        to_version: The version to return to; empty means the one served before.

    Returns:
        The version that is served now.
    """
    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.deploy.deploy import rollback
    from nudge.components.deploy.settings import deploy_settings

    with exit_with_user_errors():
        settings = deploy_settings(recipe)
        result = rollback(settings, registered_model=model_name, version=to_version)
    return str(result["version"])
