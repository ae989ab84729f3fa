"""What a registration needs that is known before training starts, checked without the registry."""

from typing import Any

from nudge.components.common.clients.registry.names import PublishedName
from nudge.components.common.clients.registry.url import RegistryUrl
from nudge.components.common.clients.registry.values import check_sendable
from nudge.components.common.core.names import check_name
from nudge.components.common.core.recipe import URI_SCHEMES, some_settings
from nudge.components.common.core.settings import settings


@settings
class _Known:
    """The settings of the step `register` that the registry stores."""

    model_name: PublishedName
    registry_url: RegistryUrl = ""
    registry_name: str = ""
    author: str = ""
    description: str = ""


def check_registration(recipe: str, version: str = "", *, model_name: str = "") -> None:
    """Raise `UserError` if the registry could not store what `register` writes of a recipe.

    ``version`` and ``model_name`` are the parameters of a pipeline; an empty version means the
    run's id, an empty name the recipe's. Values that training produces are bounded by their types.
    """
    known = some_settings(_Known, "register", recipe, model_name=model_name)
    if version:
        check_name("the version", version)
    for field in ("registry_name", "author", "description"):
        check_sendable(getattr(known, field), f"register.{field}")


def check_parameters(parameters: dict[str, Any]) -> None:
    """`check_registration` for the parameters of a pipeline that registers.

    The URI of a recipe may lead elsewhere on the cluster; `ingest` checks what it names.
    """
    recipe = str(parameters.get("recipe") or "")
    names = {name: str(parameters.get(name) or "") for name in ("version", "model_name")}
    if recipe.startswith(URI_SCHEMES):
        recipe = ""
    if recipe:
        check_registration(recipe, names["version"], model_name=names["model_name"])
        return
    if names["version"]:
        check_name("the version", names["version"])
    if names["model_name"]:
        check_registration("{}", model_name=names["model_name"])
