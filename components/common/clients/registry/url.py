"""A registry's URL, for settings too: it imports only what every installation of nudge has."""

import os
import re
from typing import Annotated
from urllib.parse import urlsplit

import pydantic

from nudge.components.common.core.errors import UserError


def registry_url(url: str = "") -> str:
    """The registry's URL, normalized: ``url`` or else NUDGE_REGISTRY_URL.

    Removes the API's own path (``/api/model_registry/v1alpha3``) and a trailing slash; keeps the
    path of a gateway before it. Raises `UserError` if there is no URL or it is invalid.
    """
    url = (url or os.environ.get("NUDGE_REGISTRY_URL", "")).strip()
    if not url:
        raise UserError(
            "no model registry is known: set registry_url in the recipe or "
            "NUDGE_REGISTRY_URL (on a laptop, `nudge services up` starts one)"
        )
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname
        wrong = wrong or bool(parts.query or parts.fragment or parts.username or parts.port == 0)
    except ValueError:
        wrong = True
    if wrong or re.search(r"\s", url):
        shown = re.sub(r"//[^/@]*@", "//...@", url)
        raise UserError(
            f"{shown!r} is not the URL of a model registry: expected https://HOST, or http://, "
            "with a port and a path if needed, and without user, query or fragment"
        )
    path = re.sub(r"/api/model_registry(/v[^/]+(/.*)?)?/*$", "", parts.path).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


RegistryUrl = Annotated[str, pydantic.AfterValidator(lambda url: url and registry_url(url))]
"""A registry's URL in settings; empty means NUDGE_REGISTRY_URL."""
