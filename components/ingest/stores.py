"""Object stores through fsspec: how they are opened, what is tried again, and what errors mean."""

import asyncio
import os
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import botocore.exceptions
import fsspec
import tenacity

from nudge.components.common.clients.storage import HINTS, connection
from nudge.components.common.core.errors import UserError
from nudge.components.ingest.downloads import Client, WebLimits

WEB = ("http://", "https://")
ATTEMPTS = 10
STORE_ATTEMPTS = 8
"""How often botocore itself tries a request, before it counts as one of `ATTEMPTS`."""
TRANSIENT = (
    OSError,
    asyncio.TimeoutError,
    aiohttp.ClientError,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.HTTPClientError,
)

NO_CREDENTIALS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
)
LASTING = (
    PermissionError,
    *NO_CREDENTIALS,
    # Asked for `STORE_ATTEMPTS` times already.
    botocore.exceptions.EndpointConnectionError,
    botocore.exceptions.SSLError,
    aiohttp.ClientSSLError,
    aiohttp.InvalidURL,  # also a redirect to another scheme than http and https
)


class Vanished(Exception):
    """An object is gone."""


def with_retries(work: Any, uri: str) -> Any:
    """Do what a store may refuse for a while; raises `Vanished`, or `UserError` if it never can."""

    def temporary(error: BaseException) -> bool:
        # fsspec's HTTP says "not found" of any failure, and keeps the true one as its cause.
        if isinstance(error, FileNotFoundError) and isinstance(
            error.__cause__, aiohttp.ClientError
        ):
            error = error.__cause__
            if getattr(error, "status", 0) in (404, 410):
                return False
        elif isinstance(error, FileNotFoundError):
            return False
        return isinstance(error, TRANSIENT) and not isinstance(error, LASTING)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(temporary),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(0.1, 20),
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
    """What a store's error comes down to, and what to do about it."""
    endpoint = os.environ.get("AWS_S3_ENDPOINT", "")
    credentials = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if isinstance(error, NO_CREDENTIALS):
        missing = [name for name in credentials if not os.environ.get(name)]
        return (
            f"{' and '.join(missing)} not set; attach a data connection, or run "
            "`nudge services up` on a laptop"
        )
    if isinstance(error, botocore.exceptions.EndpointConnectionError):
        return f"the object store {endpoint} does not answer; check AWS_S3_ENDPOINT"
    if isinstance(error, botocore.exceptions.SSLError):
        return f"the certificate of {endpoint} is not trusted; name its CA's file in AWS_CA_BUNDLE"
    if isinstance(error, aiohttp.ClientSSLError):
        return "its certificate is not trusted; name its CA's file in SSL_CERT_FILE"
    # s3fs keeps the store's own words, but the code only in the cause.
    cause: Any = error.__cause__ or error
    if isinstance(cause, botocore.exceptions.ClientError):
        code = cause.response.get("Error", {}).get("Code", "")
        return f"{code} from {endpoint or 'S3'}: {HINTS.get(code, error)}"
    return str(error) or type(error).__name__


def s3_options() -> dict[str, Any]:
    """fsspec's options for the data connection; without keys botocore looks for its own."""
    given = connection()
    return {
        "key": given.key or None,
        "secret": given.secret or None,
        "token": given.token or None,
        "use_listings_cache": False,
        # Another connection or another day's credentials are no reason to use the last ones.
        "skip_instance_cache": True,
        "client_kwargs": given.client_options(),
        "config_kwargs": {
            **given.config_options(),
            "retries": {"total_max_attempts": STORE_ATTEMPTS, "mode": "standard"},
        },
    }


def file_system_of(uri: str, setting: str, limits: WebLimits | None = None) -> tuple[Any, str]:
    """fsspec's file system for a URI, and the path in it; ``setting`` is whose URI it is."""
    options = s3_options() if uri.startswith("s3://") else {}
    if uri.startswith(WEB):
        options = {"get_client": Client(urlsplit(uri).hostname or "", limits or WebLimits())}
    try:
        file_system, path = fsspec.core.url_to_fs(uri, **options)
    except (*TRANSIENT, ValueError, ImportError) as error:
        raise UserError(f"{setting} {uri}: cannot be opened: {why(error)}") from None
    return file_system, path.rstrip("/") or path
