"""The data connection as people write it, refusals of stores, and folders made in consoles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3.exceptions
import botocore.exceptions
import pytest
from aiohttp import web

from nudge.components.common.clients import storage
from nudge.components.common.clients.bucket import download_folder
from nudge.components.common.clients.storage import (
    bucket_name,
    check_writes,
    connection,
    is_transient,
    s3_client,
    s3_errors,
)
from nudge.components.common.core.errors import UserError
from nudge.components.ingest.finding import find_sources
from nudge.components.ingest.stores import s3_options
from tests.faulty_proxy import FaultyProxy
from tests.web_server import Server

VALID = {
    "AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "s3cret",
    "AWS_S3_ENDPOINT": "https://s3.example:9000", "AWS_S3_BUCKET": "nudge",
}  # fmt: skip
VARIABLES = (*VALID, "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_CA_BUNDLE")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables of a valid connection, with changes."""

    def set_them(**changes: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in {**VALID, **changes}.items():
            monkeypatch.setenv(name, value)

    return set_them


@pytest.mark.parametrize(
    ("endpoint", "read"),
    [
        ("https://s3.example/", "https://s3.example"),
        (" http://minio:9000\n", "http://minio:9000"),
        ("s3.example", "https://s3.example"),
        ("s3.example:9000", "https://s3.example:9000"),
        ("127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("localhost:9000/", "http://localhost:9000"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("minio.storage.svc:9000", "http://minio.storage.svc:9000"),
        ("minio.storage.svc.cluster.local", "http://minio.storage.svc.cluster.local"),
        ("minio:9000", "http://minio:9000"),
        ("", ""),
    ],
)
def test_endpoints_are_normalized(
    endpoint: str, read: str, environment: Callable[..., None]
) -> None:
    environment(AWS_S3_ENDPOINT=endpoint)
    assert connection().endpoint == read
    assert s3_options()["client_kwargs"].get("endpoint_url", "") == read
    if read:
        assert s3_client().meta.endpoint_url == read


@pytest.mark.parametrize("endpoint", ["ftp://host", "https://", "host:port", "https://a b", "//"])
def test_invalid_endpoints_are_refused(endpoint: str, environment: Callable[..., None]) -> None:
    environment(AWS_S3_ENDPOINT=endpoint)
    for make in (s3_client, s3_options):
        with pytest.raises(UserError, match=r"AWS_S3_ENDPOINT is .*; expected http://host:port or"):
            make()


def test_surrounding_blanks_are_dropped_and_inner_line_breaks_refused(
    environment: Callable[..., None],
) -> None:
    environment(
        AWS_ACCESS_KEY_ID="AKIA\n", AWS_SECRET_ACCESS_KEY=" s3cret\r\n", AWS_SESSION_TOKEN="t\n",
        AWS_DEFAULT_REGION="eu-west-1 ",
    )  # fmt: skip
    credentials = s3_client()._request_signer._credentials
    assert (credentials.access_key, credentials.secret_key, credentials.token) == (
        "AKIA", "s3cret", "t",
    )  # fmt: skip
    assert s3_client().meta.region_name == "eu-west-1"
    options = s3_options()
    assert (options["key"], options["secret"], options["token"]) == ("AKIA", "s3cret", "t")
    environment(AWS_SECRET_ACCESS_KEY="s3c\nret")
    for make in (s3_client, s3_options):
        with pytest.raises(
            UserError, match="AWS_SECRET_ACCESS_KEY contains a line break"
        ) as refused:
            make()
        assert "ret;" not in str(refused.value)
    assert "s3c" not in repr(storage.Connection("e", "k", "s3c", "t", "", "", ""))


@pytest.mark.parametrize("written", ["nudge", "s3://nudge", "s3a://nudge/", " nudge\n", "nudge/"])
def test_bucket_names_are_normalized(written: str, environment: Callable[..., None]) -> None:
    environment(AWS_S3_BUCKET=written)
    assert bucket_name() == "nudge"


def test_a_bucket_with_a_path_is_refused(environment: Callable[..., None]) -> None:
    environment(AWS_S3_BUCKET="s3://nudge/models")
    with pytest.raises(UserError, match="expected only the name of a bucket"):
        bucket_name()


def test_a_missing_ca_bundle_is_named(environment: Callable[..., None]) -> None:
    environment(AWS_CA_BUNDLE="/no/such.pem")
    with pytest.raises(UserError, match="AWS_CA_BUNDLE is /no/such.pem, but there is no such"):
        s3_client()


def test_every_request_carries_the_session_token(
    connected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    faulty_proxy: Callable[..., FaultyProxy],
) -> None:
    s3_client().put_object(Bucket="nudge", Key="texts/a.txt", Body=b"a")
    proxy = faulty_proxy(connected["AWS_S3_ENDPOINT"], share=0.0)
    monkeypatch.setenv("AWS_S3_ENDPOINT", proxy.url)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token\n")
    # A proxy that does not exist: requests to this machine bypass it.
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # The embedded store refuses session tokens; only what was sent matters here.
    with pytest.raises(UserError, match="InvalidAccessKeyId"):
        find_sources("s3://nudge/texts/")
    before = len(proxy.requests)
    with pytest.raises(UserError, match="InvalidAccessKeyId"), s3_errors("list it"):
        s3_client().list_objects_v2(Bucket="nudge")
    assert 0 < before < len(proxy.requests)
    for _, _, headers, _ in proxy.requests:
        tokens = [v for name, v in headers.items() if name.lower() == "x-amz-security-token"]
        assert tokens == ["the-token"]


def refusal(status: int, code: str) -> Exception:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


def wrapped(inner: Exception) -> Exception:
    """The refusal of a store as boto3's upload_file wraps it."""
    try:
        try:
            raise inner
        except botocore.exceptions.ClientError as error:
            raise boto3.exceptions.S3UploadFailedError(f"Failed to upload: {error}")  # noqa: B904
    except boto3.exceptions.S3UploadFailedError as error:
        return error


@pytest.mark.parametrize(
    ("status", "code", "transient"),
    [
        (403, "AccessDenied", False), (403, "ExpiredToken", False), (404, "NoSuchBucket", False),
        (501, "NotImplemented", False), (507, "InsufficientStorage", False),
        (500, "InternalError", True), (503, "SlowDown", True), (429, "TooManyRequests", True),
        (400, "RequestTimeout", True),
    ],
)  # fmt: skip
def test_transient_errors(status: int, code: str, transient: bool) -> None:
    for error in (refusal(status, code), wrapped(refusal(status, code))):
        assert is_transient(error) is transient
        with pytest.raises(UserError, match=f"write it: {code} from "), s3_errors("write it"):
            raise error


def test_every_client_error_becomes_a_sentence() -> None:
    errors: list[Exception] = [
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
        botocore.exceptions.SSLError(endpoint_url="http://x", error="bad"),
        botocore.exceptions.ProxyConnectionError(proxy_url="http://x"),
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        *(kind("broken") for kind in storage.WRAPPERS),
    ]
    for error in errors:
        with pytest.raises(UserError, match="^do it: "), s3_errors("do it"):
            raise error


def test_an_error_names_the_store_of_the_request(environment: Callable[..., None]) -> None:
    """Not the data connection of the process, if the request went to another store."""

    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=403)

    environment(AWS_S3_ENDPOINT="https://minio.example.com")
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with Server(("GET", "/{any:.*}", refuse)) as server:
        url = server.url
        client = s3_client({**keys, "AWS_S3_ENDPOINT": url}, attempts=1)
        with pytest.raises(UserError, match=f"from {url}:"), s3_errors("read it"):
            client.get_object(Bucket="b", Key="k")
    refused = pytest.raises(UserError, match=f"object store {url} does not answer")
    with refused, s3_errors("read it"):
        client.get_object(Bucket="b", Key="k")


def store_without(feature: str) -> Server:
    """A store that refuses conditional writes as issues of icechunk and others show it, one that
    ignores them, or one that does not know CRC32."""

    async def put(request: web.Request) -> web.Response:
        await request.read()
        refused = (feature == "conditions" and "If-None-Match" in request.headers) or (
            feature == "crc32" and "x-amz-checksum-crc32" in request.headers
        )
        if not refused:
            return web.Response(headers={"ETag": '"x"'})
        code, status = (
            ("NotImplemented", 501) if feature == "conditions" else ("InvalidRequest", 400)
        )
        text = f"<Error><Code>{code}</Code><Message>not known</Message></Error>"
        return web.Response(status=status, text=text, content_type="application/xml")

    async def delete(_: web.Request) -> web.Response:
        return web.Response(status=204)

    return Server(("PUT", "/{any:.*}", put), ("DELETE", "/{any:.*}", delete))


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ("conditions", r"refuses a conditional write with a checksum \(NotImplemented\)"),
        ("crc32", r"refuses a conditional write with a checksum \(InvalidRequest\)"),
        ("", "ignored a conditional write and replaced an existing object"),
    ],
)
def test_a_store_that_cannot_receive_uploads_is_reported(
    feature: str, message: str, environment: Callable[..., None]
) -> None:
    with store_without(feature) as server:
        environment(AWS_S3_ENDPOINT=server.url)
        with pytest.raises(UserError, match=f"{message}.*use a store that has both"):
            check_writes(s3_client(), "nudge")


def test_the_check_of_a_store_leaves_no_object(
    connected: dict[str, str],
) -> None:
    client = s3_client()
    check_writes(client, "nudge")
    assert "Contents" not in client.list_objects_v2(Bucket="nudge")


def below(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_console_folders_and_complete_buckets_are_downloaded(
    connected: dict[str, str], tmp_path: Path
) -> None:
    client = s3_client()
    client.create_bucket(Bucket="complete")
    contents = {"made/": b"", "made/a.txt": b"a", "made/in/": b"", "made/in/b.txt": b"b"}
    for key, body in {**contents, "empty/": b""}.items():
        client.put_object(Bucket="complete", Key=key, Body=body)
    listed = client.list_objects_v2(Bucket="complete", Prefix="made/")["Contents"]
    assert "made/" in [item["Key"] for item in listed]
    download_folder("s3://complete/made/", tmp_path / "folder")
    assert below(tmp_path / "folder") == {"a.txt": b"a", "in/b.txt": b"b"}
    for number, uri in enumerate(("s3://complete", "s3://complete/")):
        download_folder(uri, tmp_path / str(number))
        assert below(tmp_path / str(number)) == {"made/a.txt": b"a", "made/in/b.txt": b"b"}
    with pytest.raises(UserError, match="s3://complete/empty: there is no object"):
        download_folder("s3://complete/empty", tmp_path / "none")
