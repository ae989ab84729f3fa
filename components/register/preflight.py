"""What the registry itself can say about a registration before training starts."""

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
    """Ask the registry whether it could take a new version of a recipe's model.

    ``url`` counts unless the recipe names one. Raises `UserError` if a server there is no registry,
    or would confuse the model with another one, or has the version. A registry that is down may be
    up again when a model has been trained: that is left to `register`.
    """
    settings = step_settings(RegisterSettings, "register", recipe)

    async def work(client: Any) -> None:
        model = await find_model(client, settings.model_name)
        if model is None:
            existing = [each.name for each in await list_models(client)]
            refuse_confusable("model", settings.model_name, existing)
        elif version and await find_model_version(client, model.id, version):
            raise UserError(
                f"{settings.model_name} {version} is registered already; give another version"
            )

    try:
        with_registry(registry_url(settings.registry_url or url), work, attempts_s=1)
    except Unreachable as error:
        if error.permanent:
            raise
