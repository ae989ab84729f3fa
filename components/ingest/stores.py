"""Object stores through fsspec: opening them, retrying, and explaining their errors."""

import asyncio
import os
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import botocore.exceptions
import fsspec
import tenacity

from nudge.components.common.clients import storage
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.retries import BACKOFF
from nudge.components.ingest.downloads import Client, WebLimits

WEB = ("http://", "https://")
ATTEMPTS = 10
TRANSIENT = (OSError, asyncio.TimeoutError, aiohttp.ClientError, *storage.S3_ERRORS)

NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
)
LASTING = (
    PermissionError,
    botocore.exceptions.EndpointConnectionError,  # botocore has tried `storage.ATTEMPTS` times
    aiohttp.ClientSSLError,
    aiohttp.InvalidURL,  # also a redirect to another scheme than http and https
)


class Vanished(Exception):
    """An object is gone."""


def with_retries(work: Any, uri: str) -> Any:
    """Call ``work`` until a store no longer fails temporarily.

    Raises `Vanished` if the object is gone, `UserError` if the failure lasts.
    """

    def temporary(error: BaseException) -> bool:
        # fsspec's HTTP reports any failure as "not found", with the true error as its cause.
        if isinstance(error, FileNotFoundError) and isinstance(
            error.__cause__, aiohttp.ClientError
        ):
            error = error.__cause__
            if getattr(error, "status", 0) in (404, 410):
                return False
        elif isinstance(error, FileNotFoundError):
            return False
        # s3fs raises an OSError, with the store's answer as its cause.
        answer = error.__cause__ if isinstance(error, OSError) else error
        if isinstance(answer, storage.S3_ERRORS) and not storage.is_transient(answer):
            return False
        return isinstance(error, TRANSIENT) and not isinstance(error, LASTING)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(temporary),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=BACKOFF,
        reraise=True,
    )
    try:
        return retrying(work)
    except FileNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, UserError):  # fsspec's HTTP hides it
            raise cause from None
        if temporary(error) or isinstance(cause, LASTING):
            raise UserError(f"{uri}: cannot be read: {why(cause or error)}") from None
        raise Vanished from None
    except TRANSIENT as error:
        raise UserError(f"{uri}: cannot be read: {why(error)}") from None


def why(error: BaseException) -> str:
    """The cause of a store's error, and what to do about it."""
    credentials = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if isinstance(error, NO_CREDENTIALS):
        missing = [name for name in credentials if not os.environ.get(name)]
        return (
            f"{' and '.join(missing)} not set; attach a data connection, or run "
            "`nudge services up` on a laptop"
        )
    if isinstance(error, aiohttp.ClientSSLError):
        return "its certificate is not trusted; set SSL_CERT_FILE to its CA's file"
    # s3fs keeps the store's message, but the error code only in the cause.
    answer = error.__cause__ or error
    if isinstance(answer, storage.S3_ERRORS):
        return storage.why(answer)
    return str(error) or type(error).__name__


def s3_options() -> dict[str, Any]:
    """fsspec's options for the data connection; without keys botocore searches for its own."""
    store = storage.connection()
    return {
        "key": store.key or None,
        "secret": store.secret or None,
        "token": store.token or None,
        "use_listings_cache": False,
        # A cached instance would keep an old connection and its credentials.
        "skip_instance_cache": True,
        "client_kwargs": store.client_options(),
        "config_kwargs": store.config_options(),
    }


def file_system_of(uri: str, setting: str, limits: WebLimits | None = None) -> tuple[Any, str]:
    """fsspec's file system for a URI, and the path in it; ``setting`` names the URI in errors."""
    options = s3_options() if uri.startswith("s3://") else {}
    if uri.startswith(WEB):
        options = {"get_client": Client(urlsplit(uri).hostname or "", limits or WebLimits())}
    try:
        file_system, path = fsspec.core.url_to_fs(uri, **options)
    except (*TRANSIENT, ValueError, ImportError) as error:
        raise UserError(f"{setting} {uri}: cannot be opened: {why(error)}") from None
    return file_system, path.rstrip("/") or path
