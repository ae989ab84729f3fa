"""Access to the Model Registry as on OpenShift AI: URL, service-account token, custom CA."""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pydantic
import tenacity

from nudge.components.common.clients.registry.url import registry_url as registry_url
from nudge.components.common.core.environment import REGISTRY_TOKEN_PATH, SERVICE_ACCOUNT
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.retries import BACKOFF

T = TypeVar("T")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ATTEMPTS_S = 60.0
"""How long to retry a registry that does not answer, with back-off."""
PERMANENT = re.compile(
    r"SQLSTATE (22|23|42|54)|Error (1048|1153|1264|1301|1366|1406)\b|too long|too large"
    r"|max_allowed_packet|Incorrect string value",
    re.IGNORECASE,
)
"""Texts of a 500 that the same request will always get: PostgreSQL's classes of bad data (22, 23,
42) and exceeded limits (54), and MariaDB's codes for the same."""


class Unreachable(Transient):
    """The registry cannot be used now; the same request may succeed later.

    ``permanent`` if only another URL can help.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


def with_registry(url: str, work: Callable[[Any], Awaitable[T]], attempts_s: float = 0) -> T:
    """Run ``work(client)`` with a `RegistryClient`, and retry it while the registry is down.

    ``work`` must be safe to repeat. Raises `Unreachable` if the registry does not answer within
    ``attempts_s`` (`ATTEMPTS_S` if 0) or not in a usable way, and `UserError` if it refuses a
    request.
    """
    import aiohttp
    from mr_openapi import Configuration
    from mr_openapi.exceptions import ApiException

    from nudge.components.common.clients.registry.client import NotARegistry, RegistryClient

    url = registry_url(url)
    token_file = Path(os.environ.get(REGISTRY_TOKEN_PATH, SERVICE_ACCOUNT / "token"))
    withheld = token_file.is_file() and not may_have_token(url)
    token = None
    if token_file.is_file() and not withheld:
        token = token_file.read_text(encoding="utf-8").strip()
    authority = os.environ.get("NUDGE_REGISTRY_CA") or None
    config = Configuration(host=url, access_token=token, ssl_ca_cert=authority)

    async def once() -> T:
        client = RegistryClient(config)
        try:
            return await work(client)
        finally:
            await client.close()

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(attempts_s or ATTEMPTS_S),
        wait=BACKOFF,
        retry=tenacity.retry_if_exception(_is_transient),
        reraise=True,
    )
    try:
        return retrying(lambda: asyncio.run(once()))
    except aiohttp.ClientConnectorCertificateError as error:
        raise Unreachable(
            f"the certificate of the model registry {url} is not trusted "
            f"({error.certificate_error}); set NUDGE_REGISTRY_CA to the file of its CA"
        ) from None
    except (TimeoutError, aiohttp.ClientError) as error:
        raise Unreachable(f"the model registry {url} does not answer: {error}") from None
    except NotARegistry as error:
        raise Unreachable(
            f"the model registry {url} is not a Model Registry: {error}; correct the URL "
            "(registry_url, NUDGE_REGISTRY_URL)",
            permanent=True,
        ) from None
    except pydantic.ValidationError as error:
        raise Unreachable(
            f"the model registry {url} sent an answer that its client cannot read: {error}"
        ) from None
    except ApiException as error:
        raise _explained(error, url, token_file if token else None, withheld) from None


def may_have_token(url: str) -> bool:
    """Whether this process's token may be sent to a registry.

    It goes to this machine, to the registry of NUDGE_REGISTRY_URL, and to Services of the cluster;
    over https, except on this machine. If NUDGE_REGISTRY_URL is on this machine, the token is that
    registry's own, and no other registry gets it, because a recipe may name any.
    """
    parts, configured = urlsplit(url), urlsplit(os.environ.get("NUDGE_REGISTRY_URL", "").strip())
    host = parts.hostname or ""
    if host in LOOPBACK:
        return True
    if parts.scheme != "https" or configured.hostname in LOOPBACK:
        return False
    inside = host.endswith((".svc", ".svc.cluster.local"))
    return inside or (parts.scheme, parts.netloc) == (configured.scheme, configured.netloc)


def _explained(error: Any, url: str, token_file: Path | None, withheld: bool) -> UserError:
    who = f"the token in {token_file}" if token_file else "requests without a token"
    if withheld:
        who = (
            "requests without a token, and the token is sent only over https to the registry of "
            "NUDGE_REGISTRY_URL or to a Service of the cluster; set NUDGE_REGISTRY_URL to this "
            "registry if it may have the token"
        )
    hint = {
        401: f"it does not accept {who}",
        403: "this account has no permission for that; bind it to the registry's role "
        "(registry-user-<name of the registry>)",
    }.get(error.status)
    kind = Unreachable if hint or _is_transient(error) else UserError
    return kind(f"the model registry {url} answered {error.status}: {hint or error.body}")


def _is_transient(error: BaseException) -> bool:
    """Whether to retry a request: no answer, an incomplete answer, or a busy server."""
    import aiohttp
    from mr_openapi.exceptions import ApiException, ServiceException

    if isinstance(error, ApiException):
        if isinstance(error, ServiceException):
            return PERMANENT.search(error.body or "") is None
        return bool(error.status == 429)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return False
    return isinstance(error, aiohttp.ClientError | asyncio.TimeoutError)
