"""The object store of a data connection: its address and keys from the AWS_* variables."""

import contextlib
import fnmatch
import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions
import s3transfer.exceptions
from nudge.components.common.errors import Transient, UserError

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT", "AWS_S3_BUCKET")
"""The variables of a data connection (an OpenShift AI connection Secret has the same keys)."""

ATTEMPTS = 8
"""How often one request is tried before a store that fails is given up."""


def s3_client() -> Any:
    """A boto3 client for the data connection; raises `UserError` naming the variables missing."""
    missing = [key for key in KEYS[:3] if not os.environ.get(key)]
    if missing:
        raise UserError(
            f"the data connection is not complete: {', '.join(missing)} not set; attach a "
            "connection to the pipeline, or run `nudge services up` on a laptop"
        )
    # A session of its own: boto3's shared one keeps the first credentials that it met.
    client = boto3.Session().client(
        "s3",
        endpoint_url=os.environ["AWS_S3_ENDPOINT"],
        region_name=os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        config=botocore.config.Config(
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=10,
            read_timeout=60,
        ),
    )
    client.meta.events.register("needs-retry.s3", _wait_when_asked_to)
    return client


def _wait_when_asked_to(response: Any, attempts: int, **_: Any) -> float | None:
    """Seconds to wait before asking again, or None: botocore's standard mode takes a plain 429 as
    final (it looks for error codes alone, https://docs.aws.amazon.com/sdkref)."""
    busy = response is not None and response[0].status_code == 429
    return min(random.uniform(0, 2**attempts), 8.0) if busy and attempts < ATTEMPTS else None


def split_s3_uri(uri: str) -> tuple[str, str]:
    """``s3://bucket/key`` as (bucket, key), the key without a slash at its end."""
    # No urlsplit: a key may hold a ``?`` or ``#``, which end nothing here.
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise UserError(f"{uri}: expected s3://bucket/key")
    return bucket, key.strip("/")


HINTS = {
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret is wrong; check AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "this key may not do that",
    "NoSuchBucket": "there is no such bucket; check AWS_S3_BUCKET",
    "InsufficientStorage": "the store is full",
}


@contextlib.contextmanager
def s3_errors(doing: str) -> Iterator[None]:
    """Turn what the object store refuses into a `UserError` of one sentence about ``doing``."""
    endpoint = os.environ.get("AWS_S3_ENDPOINT", "")
    try:
        yield
    except (
        botocore.exceptions.EndpointConnectionError,
        botocore.exceptions.ConnectionClosedError,
        botocore.exceptions.HTTPClientError,
    ):
        raise Transient(f"{doing}: the object store {endpoint} does not answer") from None
    except (
        boto3.exceptions.RetriesExceededError,
        s3transfer.exceptions.RetriesExceededError,
        s3transfer.exceptions.S3DownloadFailedError,
    ) as error:
        raise Transient(f"{doing}: {endpoint} did not give it whole: {error}") from None
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        hint = HINTS.get(code, error.response.get("Error", {}).get("Message", "refused"))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        kind = Transient if status == 429 or status >= 500 else UserError
        raise kind(f"{doing}: {code} from {endpoint}: {hint}") from None


def list_keys(client: Any, bucket: str, prefix: str) -> dict[str, int]:
    """Every key below ``prefix/`` with its size in bytes."""
    return _sizes(client, bucket, f"{prefix}/")


def _sizes(client: Any, bucket: str, start: str) -> dict[str, int]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=start)
    return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}


def download_folder(uri: str, folder: Path, files: tuple[str, ...] = ("*",)) -> None:
    """Download what is below an ``s3://`` URI (in all of a bucket, where it names no key) and has a
    name like one of ``files``.

    Raises `UserError` if there is nothing at all.
    """
    bucket, prefix = split_s3_uri(uri)
    client = s3_client()
    with s3_errors(f"download {uri}"):
        start = f"{prefix}/" if prefix else ""
        # Consoles make a folder as an empty object, whose key ends in a slash.
        keys = [key for key in _sizes(client, bucket, start) if not key.endswith("/")]
        if not keys:
            raise UserError(f"{uri}: there is nothing")
        for key in keys:
            if not any(fnmatch.fnmatch(key, pattern) for pattern in files):
                continue
            path = (folder / key.removeprefix(start)).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise UserError(f"{uri}: the key {key} leads out of the folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, key, str(path))


def delete_version(uri: str) -> bool:
    """Delete an uploaded version: its manifest, so that it is invisible, and then its files.

    False if there is none; what has no manifest of ours is left alone.
    """
    if urlsplit(uri).scheme != "s3":
        return False
    bucket, prefix = split_s3_uri(uri)
    client = s3_client()
    with s3_errors(f"delete {uri}"):
        keys = list_keys(client, bucket, prefix)
        manifest = f"{prefix}/manifest.json"
        if manifest not in keys:
            return False
        body = io.BytesIO()
        client.download_fileobj(bucket, manifest, body)
        if json.loads(body.getvalue()).get("format") != "nudge.upload":
            return False
        for key in (manifest, *(key for key in keys if key != manifest)):
            client.delete_object(Bucket=bucket, Key=key)
    return True
