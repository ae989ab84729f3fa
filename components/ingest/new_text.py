"""Decides whether there is text that the served model has not been trained on."""

from nudge.components.common.core.errors import UserError
from nudge.components.ingest.settings import IngestSettings


def is_new(settings: IngestSettings, fingerprint: str) -> bool:
    """Whether a corpus differs from the one that the served version was trained on.

    Always True unless ``settings.only_new`` is set. The registry knows the fingerprint of each
    version's corpus; if no version of ``settings.model_name`` is served, every corpus is new.
    Raises `UserError` if the registry does not answer: no answer does not mean "nothing new".
    """
    if not settings.only_new:
        return True
    if not settings.model_name:
        raise UserError("ingest.only_new needs model_name: the model whose served version counts")
    from nudge.components.common.clients.registry.connection import registry_url, with_registry
    from nudge.components.common.clients.registry.releases import find_served, find_version

    url = registry_url(settings.registry_url)
    served = with_registry(url, find_served(settings.model_name))
    if served is None:
        return True
    version = with_registry(url, find_version(settings.model_name, served.main))
    return str(version.properties.get("data_fingerprint", "")) != fingerprint
