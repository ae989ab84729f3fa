"""The Model Registry, reached as on OpenShift AI: URL, service-account token, custom CA."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from nudge.components.common.errors import Transient, UserError

T = TypeVar("T")

TOKEN_PATH = "/var/run/secrets/kubernetes.io/serviceaccount/token"
ATTEMPTS_S = 60.0
"""How long a registry that does not answer is asked again, with back-off."""


class Unreachable(Transient):
    """The registry cannot be used now; the same may succeed later."""


def registry_url(given: str = "") -> str:
    """The registry's URL: the one given, or NUDGE_REGISTRY_URL; raises `UserError` if neither."""
    url = given or os.environ.get("NUDGE_REGISTRY_URL", "")
    if not url:
        raise UserError(
            "no model registry is known: give registry_url in the recipe or set "
            "NUDGE_REGISTRY_URL (on a laptop `nudge services up` starts one)"
        )
    return url.rstrip("/")


def with_registry(url: str, work: Callable[[Any], Awaitable[T]], attempts_s: float = 0) -> T:
    """Run ``work(client)`` with a `ModelRegistryAPIClient`, again while the registry is down.

    ``work`` must be safe to repeat. Raises `Unreachable` if the registry does not answer in time,
    or not as one that can be used, and `UserError` if it refuses what it was given.
    """
    import aiohttp
    from model_registry.core import ModelRegistryAPIClient
    from mr_openapi import Configuration
    from mr_openapi.exceptions import ApiException

    token_file = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", TOKEN_PATH))
    token = token_file.read_text(encoding="utf-8").strip() if token_file.is_file() else None
    authority = os.environ.get("NUDGE_REGISTRY_CA") or None
    client = ModelRegistryAPIClient(
        Configuration(host=url, access_token=token, ssl_ca_cert=authority)
    )
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(attempts_s or ATTEMPTS_S),
        wait=tenacity.wait_random_exponential(0.2, max=8),
        retry=tenacity.retry_if_exception(_is_passing),
        reraise=True,
    )
    try:
        return retrying(lambda: asyncio.run(_awaited(work, client)))
    except aiohttp.ClientConnectorCertificateError as error:
        raise Unreachable(
            f"the model registry {url} shows a certificate that nobody known here has signed "
            f"({error.certificate_error}); set NUDGE_REGISTRY_CA to the file of its authority"
        ) from None
    except (TimeoutError, aiohttp.ClientError) as error:
        raise Unreachable(f"the model registry {url} does not answer: {error}") from None
    except ApiException as error:
        who = f"the token in {token_file}" if token else f"no token (there is none at {token_file})"
        hint = {
            401: f"it does not accept {who}",
            403: "this account may not do that; bind it to the registry's role "
            "(registry-user-<name of the registry>)",
        }.get(error.status)
        if hint or _is_passing(error):
            raise Unreachable(
                f"the model registry {url} answered {error.status}: {hint or error.body}"
            ) from None
        raise UserError(f"the model registry {url} answered {error.status}: {error.body}") from None


def _is_passing(error: BaseException) -> bool:
    """Whether the same may be asked again: no answer, half an answer, or a busy server."""
    import aiohttp
    from mr_openapi.exceptions import ApiException, ServiceException

    if isinstance(error, ApiException):
        return isinstance(error, ServiceException) or error.status == 429
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return False
    return isinstance(error, aiohttp.ClientError | asyncio.TimeoutError)


async def _awaited(work: Callable[[Any], Awaitable[T]], client: Any) -> T:
    return await work(client)
