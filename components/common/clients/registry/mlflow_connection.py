"""A connection to MLflow's registry: its URL, its credentials, and what its errors mean.

A URL ``mlflow+https://HOST`` names the server at ``https://HOST``. The credentials are MLflow's own
variables (MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD).
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import tenacity

from nudge.components.common.clients.registry.unreachable import Unreachable
from nudge.components.common.clients.registry.url import MLFLOW
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.retries import BACKOFF

T = TypeVar("T")

CREDENTIALS = (
    "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_CLIENT_CERT_PATH",
)  # fmt: skip
OWN_SERVERS = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "NUDGE_REGISTRY_URL")
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""MLflow's own default is 7 retries per request, which takes minutes if nothing answers."""


def with_mlflow(url: str, work: Callable[[Any], Awaitable[T]], attempts_s: float) -> T:
    """As `with_registry`, with an `MlflowRegistry`."""
    address = url.removeprefix(MLFLOW)
    _refuse_foreign(address)
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise UserError(
            f"the registry {url} needs MLflow's client: pip install 'nudge-lm[mlflow]'"
        ) from None
    from nudge.components.common.clients.registry.mlflow_registry import MlflowRegistry

    async def once() -> T:
        client = MlflowClient(tracking_uri=address, registry_uri=address)
        return await work(MlflowRegistry(client))

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(attempts_s),
        wait=BACKOFF,
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, MlflowException) and not _is_refusal(error)
        ),
        reraise=True,
    )
    try:
        return retrying(lambda: asyncio.run(once()))
    except MlflowException as error:
        status = error.get_http_status_code()
        what = f"the model registry {url} answered {error.error_code}: {error.message}"
        if status in (401, 403):
            raise Unreachable(f"{what}; check {', '.join(CREDENTIALS[:3])}") from None
        if _is_refusal(error):
            raise UserError(what) from None
        raise Unreachable(f"the model registry {url} does not answer: {error.message}") from None


def _is_refusal(error: Any) -> bool:
    """Whether the server refused a request, so that the same one will be refused again."""
    from mlflow.exceptions import RestException

    status = error.get_http_status_code()
    return isinstance(error, RestException) and 400 <= status < 500 and status != 429


def _refuse_foreign(address: str) -> None:
    """Raise `UserError` rather than send this process's credentials to another server: a recipe may
    name any."""
    set_here = [name for name in CREDENTIALS if os.environ.get(name)]
    known = {
        (parts.scheme, parts.netloc)
        for name in OWN_SERVERS
        if (parts := urlsplit(os.environ.get(name, "").strip().removeprefix(MLFLOW))).netloc
    }
    parts = urlsplit(address)
    if set_here and (parts.scheme, parts.netloc) not in known:
        raise UserError(
            f"{', '.join(set_here)} would be sent to {address}, which is not the server of "
            f"{' or '.join(OWN_SERVERS)}; set one of these to it if it may have them"
        )
