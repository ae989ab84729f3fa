"""The registry's own checks of a registration before training starts."""

from typing import Any

from nudge.components.common.clients.registry.connection import (
    Unreachable,
    registry_url,
    with_registry,
)
from nudge.components.common.clients.registry.lookup import (
    find_model,
    find_model_version,
    list_models,
)
from nudge.components.common.clients.registry.names import refuse_confusable
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.register.settings import RegisterSettings


def check_registry(url: str, recipe: str, version: str = "") -> None:
    """Check that the registry can accept a new version of a recipe's model.

    ``url`` is used unless the recipe names a registry. Raises `UserError` if the server is not a
    registry, would confuse the model with another one, or has the version already. A registry that
    is down is not an error: it may be back when the model is trained, and `register` checks it
    then.
    """
    settings = step_settings(RegisterSettings, "register", recipe)

    async def work(client: Any) -> None:
        model = await find_model(client, settings.model_name)
        if model is None:
            existing = [each.name for each in await list_models(client)]
            refuse_confusable("model", settings.model_name, existing)
        elif version and await find_model_version(client, model.id, version):
            raise UserError(
                f"{settings.model_name} {version} is registered already; choose another version"
            )

    try:
        with_registry(registry_url(settings.registry_url or url), work, attempts_s=1)
    except Unreachable as error:
        if error.permanent:
            raise
