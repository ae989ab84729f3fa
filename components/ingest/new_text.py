"""Whether there is text that the served model has not been trained on."""

from nudge.components.common.core.errors import UserError
from nudge.components.ingest.settings import IngestSettings


def is_new(settings: IngestSettings, fingerprint: str) -> bool:
    """Whether a corpus differs from the one behind what is served of ``settings.model_name``.

    True without asking anybody unless ``settings.only_new``. The registry knows the fingerprint of
    each version's corpus; where nothing is served, every corpus is new. Raises `UserError` if the
    registry cannot be asked: no answer is not "nothing new".
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
