"""The version that users meet now: found, none, or not known; three different answers."""

import dataclasses
from typing import Literal

from nudge.components.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Incumbent:
    """``why`` says, of an ``unknown`` one, what could not be asked."""

    state: Literal["found", "none", "unknown"]
    version: str = ""
    uri: str = ""
    why: str = ""


def find_incumbent(model_name: str, registry_url: str = "") -> Incumbent:
    """Ask the registry what is served of a model, and the endpoint whether it answers.

    A registry or an endpoint that does not answer gives ``unknown``, never ``none``: what users
    have might be better than any candidate.
    """
    from nudge.components.common.registry import registry_url as known_url
    from nudge.components.common.registry import with_registry
    from nudge.components.common.releases import find_served, find_version

    try:
        url = known_url(registry_url)
        served = with_registry(url, find_served(model_name))
        if served is None:
            return Incumbent("none")
        version = with_registry(url, find_version(model_name, served.main))
    except UserError as error:
        return Incumbent("unknown", why=str(error))
    if not _answers(served.endpoint):
        return Incumbent(
            "unknown",
            version=served.main,
            why=f"{model_name} {served.main} should be served at {served.endpoint}, which does not "
            f"answer; bring it back (`nudge promote {served.main} --model {model_name}`)",
        )
    return Incumbent("found", version=served.main, uri=version.uri)


def _answers(endpoint: str) -> bool:
    """Whether a server is there: asking for a key is an answer, a gateway's 5xx is none."""
    import httpx

    try:
        return httpx.get(f"{endpoint}/health", timeout=10.0).status_code < 500
    except httpx.HTTPError:
        return False
