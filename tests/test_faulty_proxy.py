"""The proxy that tests hurt others with does what it says, and nothing else."""

import contextlib
from collections.abc import Callable, Iterator

import httpx
import pytest
from aiohttp import web

from nudge.components.common.clients.storage import s3_client
from tests.faulty_proxy import FAULTS, FaultyProxy
from tests.local_registry import registry_headers
from tests.web_server import Server

Proxied = Callable[..., FaultyProxy]
BODY = bytes(range(256)) * 1000


class Echo(Server):
    """Answers each request with its own body, and counts complete requests."""

    def __init__(self) -> None:
        super().__init__(("*", "/{anything:.*}", self._answer))
        self.complete = 0

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.complete += 1
        return web.Response(body=body or b"empty", headers={"Seen-Host": request.host})


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as echo:
        yield echo


def test_without_faults_all_passes_as_it_was_sent(echo: Echo, faulty_proxy: Proxied) -> None:
    proxy = faulty_proxy(echo.url, share=0.0)
    answer = httpx.post(f"{proxy.url}/a%2Fb?c=%20d", content=BODY)
    assert answer.content == BODY
    assert answer.headers["Seen-Host"] == proxy.url.removeprefix("http://")
    assert proxy.requests[0][:2] == ("POST", "/a%2Fb?c=%20d")
    assert proxy.counts == {"passed": 1}


@pytest.mark.parametrize(
    ("fault", "met", "done"),
    [
        ("500", 500, 0),
        ("503", 503, 0),
        ("429", 429, 0),
        ("reset", httpx.TransportError, 0),
        ("cut-upload", httpx.TransportError, 0),
        ("lost", httpx.TransportError, 1),
        ("cut-download", httpx.RemoteProtocolError, 1),
        ("slow", 200, 1),
    ],
)
def test_each_fault_is_what_it_says(
    fault: str, met: int | type[Exception], done: int, echo: Echo, faulty_proxy: Proxied
) -> None:
    proxy = faulty_proxy(echo.url, share=0.0)
    proxy.planned.append(fault)  # type: ignore[arg-type]
    if isinstance(met, int):
        answer = httpx.post(proxy.url, content=BODY)
        assert answer.status_code == met
        assert (answer.headers.get("Retry-After") == "1") is (met in (503, 429))
        assert (answer.content == BODY) is (met == 200)
    else:
        with pytest.raises(met):
            httpx.post(proxy.url, content=BODY)
    assert echo.complete == done
    assert proxy.counts == {fault: 1}
    assert httpx.post(proxy.url, content=BODY).content == BODY


def test_a_seeded_share_is_hurt_and_can_be_switched_off(echo: Echo, faulty_proxy: Proxied) -> None:
    hurt, client = [], httpx.Client()
    for _ in range(2):
        proxy = faulty_proxy(
            echo.url, share=0.2, seed=3, slow_s=0.001, only=lambda method, path: path != "/safe"
        )
        for number in range(200):
            with contextlib.suppress(httpx.TransportError):
                client.put(f"{proxy.url}/{number}", content=b"some body")
        hurt.append([fault for *_, fault in proxy.requests])
        assert set(proxy.counts) == {*FAULTS, "passed"}
        assert 25 <= proxy.hurt <= 55
        before = proxy.hurt
        for path in ("/safe", "/also"):
            proxy.share = 0.2 if path == "/safe" else 0.0
            for _ in range(20):
                assert client.get(proxy.url + path).status_code == 200
        assert proxy.hurt == before
    assert hurt[0] == hurt[1]


def test_it_stands_in_front_of_a_store_that_checks_signatures(
    connected: dict[str, str], faulty_proxy: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = faulty_proxy(connected["AWS_S3_ENDPOINT"], share=0.2, seed=5, slow_s=0.01)
    monkeypatch.setenv("AWS_S3_ENDPOINT", proxy.url)
    client = s3_client()
    for number in range(10):
        key = f"a folder/ü{number}"
        client.put_object(Bucket="nudge", Key=key, Body=BODY, ChecksumAlgorithm="CRC32")
    assert proxy.hurt > 0
    proxy.share = 0.0
    listed = client.list_objects_v2(Bucket="nudge", Prefix="a folder/")["Contents"]
    assert {item["Size"] for item in listed} == {len(BODY)}
    assert client.get_object(Bucket="nudge", Key="a folder/ü7")["Body"].read() == BODY
    registry = faulty_proxy(connected["NUDGE_REGISTRY_URL"], share=0.0)
    path = "/api/model_registry/v1alpha3/registered_models"
    assert httpx.get(registry.url + path, headers=registry_headers()).json()["size"] == 0
