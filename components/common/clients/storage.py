"""The object store of a data connection: its address and keys from the AWS_* variables.

`connection` is the only reader of those variables, and `s3_errors` covers everything that a store
and its clients raise.
"""

import base64
import contextlib
import functools
import ipaddress
import os
import random
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions
import s3transfer.exceptions

from nudge.components.common.core.errors import Transient, UserError

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT", "AWS_S3_BUCKET")
"""The variables of a data connection, and the keys of an OpenShift AI connection Secret."""

ATTEMPTS = 8
"""How often to try one request at a failing store."""


@dataclass(frozen=True)
class Connection:
    """A data connection; unset fields are empty. Created by `connection`."""

    endpoint: str
    key: str = field(repr=False)
    secret: str = field(repr=False)
    token: str = field(repr=False)
    region: str
    bucket: str
    ca_bundle: str

    def client_options(self) -> dict[str, Any]:
        """The keyword arguments of a boto3 or aiobotocore client, without its ``config``."""
        options = {
            "endpoint_url": self.endpoint,
            "region_name": self.region or ("us-east-1" if self.endpoint else ""),
            "verify": self.ca_bundle,
        }
        return {name: value for name, value in options.items() if value}

    def config_options(self, attempts: int | None = None) -> dict[str, Any]:
        """The keyword arguments of the ``config`` of such a client, which sends a request up to
        ``attempts`` times."""
        retries = {"mode": "standard", "total_max_attempts": attempts or ATTEMPTS}
        options: dict[str, Any] = {"retries": retries}
        if self.endpoint:
            options["s3"] = {"addressing_style": "path"}
        if _is_loopback(self.endpoint):
            options["proxies"] = {}  # otherwise botocore uses HTTP_PROXY
        return options


def connection(variables: Mapping[str, str] = os.environ) -> Connection:
    """The data connection that the AWS_* variables describe.

    Blanks and line breaks around a value are dropped: a Secret created with ``echo`` has one. An
    endpoint without a scheme gets http on this machine and for names within a cluster, and https
    elsewhere. The bucket may be written as ``s3://name`` or ``s3a://name``. Raises `UserError` for
    an invalid value, without repeating a key.
    """
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    key, secret, token = (_value(name, variables) for name in names)
    ca_bundle = _value("AWS_CA_BUNDLE", variables)
    if ca_bundle and not Path(ca_bundle).exists():
        raise UserError(f"AWS_CA_BUNDLE is {ca_bundle}, but there is no such file or folder")
    region = _value("AWS_DEFAULT_REGION", variables) or _value("AWS_REGION", variables)
    endpoint, bucket = _endpoint(variables), bucket_name(variables)
    return Connection(endpoint, key, secret, token, region, bucket, ca_bundle)


def bucket_name(variables: Mapping[str, str] = os.environ) -> str:
    """The bucket of the data connection, or "" if AWS_S3_BUCKET is not set."""
    value = _value("AWS_S3_BUCKET", variables)
    bucket = value.removeprefix("s3a://").removeprefix("s3://").strip("/")
    if "/" in bucket or (value and not bucket):
        raise UserError(f"AWS_S3_BUCKET is {value!r}; expected only the name of a bucket")
    return bucket


def _value(name: str, variables: Mapping[str, str]) -> str:
    value = variables.get(name, "").strip()
    if any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in value):
        raise UserError(f"{name} contains a line break or another control character; remove it")
    return value


def _endpoint(variables: Mapping[str, str]) -> str:
    value = _value("AWS_S3_ENDPOINT", variables)
    if not value:
        return ""
    endpoint = value.rstrip("/")
    if "://" not in value:
        host = urlsplit(f"//{endpoint}").hostname or ""
        inside = _is_loopback(f"//{endpoint}") or "." not in host.removesuffix(".")
        inside = inside or host.endswith((".svc", ".svc.cluster.local"))
        endpoint = f"{'http' if inside else 'https'}://{endpoint}"
    parts = urlsplit(endpoint)
    try:
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is not a number
        valid = False
    if not valid or " " in endpoint or parts.query or parts.username:
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        raise UserError(f"AWS_S3_ENDPOINT is {shown!r}; expected http://host:port or https://host")
    return endpoint


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def s3_client(
    variables: Mapping[str, str] = os.environ,
    *,
    attempts: int | None = None,
    connect_timeout_s: float = 10,
    read_timeout_s: float = 60,
) -> Any:
    """A boto3 client for the data connection that the AWS_* ``variables`` describe.

    Raises `UserError` naming the variables that are missing, or the one that is invalid.
    """
    data = connection(variables)
    values = (data.key, data.secret, data.endpoint)
    missing = [key for key, value in zip(KEYS[:3], values, strict=True) if not value]
    if missing:
        raise UserError(
            f"the data connection is incomplete: {', '.join(missing)} not set; attach a "
            "connection to the pipeline, or run `nudge services up` on a laptop"
        )
    # A separate session: boto3's shared one keeps the first credentials that it saw.
    client = boto3.Session().client(
        "s3",
        aws_access_key_id=data.key,
        aws_secret_access_key=data.secret,
        aws_session_token=data.token or None,
        config=botocore.config.Config(
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            **data.config_options(attempts),
        ),
        **data.client_options(),
    )
    client.meta.events.register(
        "needs-retry.s3", functools.partial(_retry_429, limit=attempts or ATTEMPTS)
    )
    client.meta.events.register(
        "after-call.s3", functools.partial(_note_endpoint, endpoint=client.meta.endpoint_url)
    )
    return client


def _note_endpoint(parsed: dict[str, Any], endpoint: str, **_: Any) -> None:
    """Add the client's endpoint to an answer, which an error keeps for `why`."""
    parsed.setdefault("ResponseMetadata", {})[ENDPOINT] = endpoint


def check_writes(client: Any, bucket: str) -> None:
    """Raise `UserError` unless the bucket supports what an upload needs: a CRC32 sent with an
    object, and a conditional write that fails if the object exists already."""
    key, body = f".nudge-check-{uuid.uuid4().hex}", b"nudge"
    crc32 = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
    needed = (
        "nudge uploads models with conditional writes (If-None-Match) and CRC32 checksums: use a "
        "store that has both, or set upload.target to an oci:// image"
    )
    written = 0
    with s3_errors(f"write to the bucket {bucket}"):
        try:
            for _ in range(2):
                client.put_object(
                    Bucket=bucket, Key=key, Body=body, IfNoneMatch="*", ChecksumCRC32=crc32
                )
                written += 1
        except botocore.exceptions.ClientError as error:
            code, status = code_of(error), error.response["ResponseMetadata"]["HTTPStatusCode"]
            if written and status in (409, 412):
                return
            if status in (400, 501):
                raise UserError(
                    f"the object store {client.meta.endpoint_url} refuses a conditional write with "
                    f"a checksum ({code}); {needed}"
                ) from None
            raise
        finally:
            if written:
                with contextlib.suppress(
                    botocore.exceptions.ClientError
                ):  # no permission to delete
                    client.delete_object(Bucket=bucket, Key=key)
    raise UserError(
        f"the object store {client.meta.endpoint_url} ignored a conditional write and replaced an "
        f"existing object; {needed}"
    )


def _retry_429(response: Any, attempts: int, limit: int, **_: Any) -> float | None:
    """Seconds to wait before retrying a 429, otherwise None: botocore's standard mode treats a
    plain 429 as final (it looks only at error codes, https://docs.aws.amazon.com/sdkref)."""
    busy = response is not None and response[0].status_code == 429
    return min(random.uniform(0, 2**attempts), 8.0) if busy and attempts < limit else None


def split_s3_uri(uri: str) -> tuple[str, str]:
    """``s3://bucket/key`` as (bucket, key), the key without slashes at its ends."""
    # No urlsplit: a key may contain ``?`` or ``#``.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise UserError(f"{uri}: expected s3://bucket/key")
    return bucket, key.strip("/")


ENDPOINT = "NudgeEndpoint"
"""The name under which the metadata of an answer has the endpoint of its client."""
HINTS = {
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret is wrong; check AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "this key may not do that",
    "ExpiredToken": "the keys have expired; set new ones and their AWS_SESSION_TOKEN",
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to this key",
    "QuotaExceeded": "the quota is used up",
    "NoSuchBucket": "there is no such bucket; check AWS_S3_BUCKET",
    "InsufficientStorage": "the store is full",
    "NotImplemented": "the store lacks a part of S3 that nudge needs; `nudge doctor` checks which",
}

WRAPPERS = (
    boto3.exceptions.Boto3Error,
    s3transfer.exceptions.RetriesExceededError,
    s3transfer.exceptions.S3CopyFailedError,
    s3transfer.exceptions.S3DownloadFailedError,
    s3transfer.exceptions.S3UploadFailedError,
    s3transfer.exceptions.TransferNotDoneError,
)
"""Exceptions that boto3's transfers raise around the store's or the connection's own."""

S3_ERRORS = (
    botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, *WRAPPERS,
)  # fmt: skip
"""Everything that a request to a store may raise: no answer, a refusal, or a wrapper of one."""

TRANSIENT_CODES = {
    "InternalError", "OperationAborted", "PriorRequestNotComplete", "RequestTimeout",
    "RequestTimeTooSkewed", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequests",
}  # fmt: skip
PERMANENT_STATUSES = (501, 507)
"""NotImplemented and InsufficientStorage: the statuses of 500 and above that are permanent."""

SILENT = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
)
"""No answer, or an interrupted one."""


def cause_of(error: BaseException) -> BaseException:
    """The exception that the store or the connection raised, without boto3's wrappers."""
    while isinstance(error, WRAPPERS):
        inner = error.__cause__ or error.__context__
        inner = inner or getattr(error, "last_exception", None)
        if inner is None:
            break
        error = inner
    return error


def code_of(error: BaseException) -> str:
    """S3's code of a refusal, such as AccessDenied; "" for other errors."""
    cause = cause_of(error)
    if not isinstance(cause, botocore.exceptions.ClientError):
        return ""
    return str(cause.response.get("Error", {}).get("Code", ""))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later without a change."""
    cause = cause_of(error)
    if isinstance(cause, botocore.exceptions.SSLError):
        return False
    if isinstance(cause, botocore.exceptions.ClientError):
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        busy = status in (408, 429) or (status >= 500 and status not in PERMANENT_STATUSES)
        return busy or code_of(cause) in TRANSIENT_CODES
    return isinstance(cause, (OSError, botocore.exceptions.IncompleteReadError, *SILENT, *WRAPPERS))


def _endpoint_of(cause: BaseException) -> str:
    """The endpoint that a request went to, as it was configured."""
    configured = os.environ.get("AWS_S3_ENDPOINT", "").strip()
    response = getattr(cause, "response", None) or {}
    asked = response.get("ResponseMetadata", {}).get(ENDPOINT, "")
    asked = asked or getattr(cause, "kwargs", {}).get("endpoint_url", "")
    parts = urlsplit(str(asked or ""))
    if parts.scheme not in ("http", "https") or parts.netloc == urlsplit(configured).netloc:
        return configured or "S3"
    if "://" not in configured and configured.rstrip("/") == parts.netloc:
        return configured
    return f"{parts.scheme}://{parts.netloc}"


def why(error: BaseException) -> str:
    """The cause of an error in one clause, and what to check."""
    cause, code = cause_of(error), code_of(error)
    endpoint = _endpoint_of(cause)
    if isinstance(cause, botocore.exceptions.ClientError):
        hint = HINTS.get(code, cause.response.get("Error", {}).get("Message", "refused"))
        return f"{code} from {endpoint}: {hint}"
    if isinstance(error, WRAPPERS):
        return f"the transfer from or to {endpoint} was incomplete: {error}"
    if isinstance(cause, botocore.exceptions.SSLError):
        if "://" not in endpoint:
            return f"{endpoint} does not use TLS; if that is intended, write http:// before it"
        return f"the certificate of {endpoint} is not trusted; set AWS_CA_BUNDLE to its CA's file"
    if isinstance(cause, botocore.exceptions.ProxyConnectionError):
        return f"the proxy to {endpoint} does not answer; check HTTP_PROXY, HTTPS_PROXY, NO_PROXY"
    if isinstance(cause, SILENT):
        return f"the object store {endpoint} does not answer; check AWS_S3_ENDPOINT"
    return f"{type(cause).__name__}: {cause}"


@contextlib.contextmanager
def s3_errors(doing: str) -> Iterator[None]:
    """Turn an object store's errors into a `UserError` with one sentence about ``doing``."""
    try:
        yield
    except S3_ERRORS as error:
        kind = Transient if is_transient(error) else UserError
        raise kind(f"{doing}: {why(error)}") from None
