"""Objects behind URIs: read exactly despite faults, resumed, or counted as changed or gone."""

import gzip
import io
import json
import os
import random
import re
import ssl
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import trustme
from aiohttp import web

from nudge.components.common.artifacts.corpus import read_corpus, zstd
from nudge.components.common.artifacts.schema import plain
from nudge.components.common.clients import storage
from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.components.ingest import sources
from nudge.components.ingest.account import account
from nudge.components.ingest.finding import find_sources
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from tests.components.ingest.test_state import tree
from tests.components.ingest.web import files, hub, streamed, whole
from tests.faulty_proxy import Fault, FaultyProxy
from tests.web_server import Server

Store = Callable[..., FaultyProxy]
BLOCK = 1 << 16


def texts(seed: int, count: int) -> list[str]:
    choice = random.Random(seed)
    return [" ".join(f"w{choice.randrange(10**6)}" for _ in range(80)) for _ in range(count)]


def lines(seed: int, count: int) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts(seed, count)).encode()


def objects() -> dict[str, bytes]:
    """Objects of several blocks each, in formats that are read sequentially and with seeks."""
    table, archive = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts(3, 400)}), table, row_group_size=100)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(4):
            file.writestr(f"{number}.jsonl", lines(10 + number, 100))
    return {
        "a.jsonl": lines(1, 400),
        "b.jsonl.zst": zstd.compress(lines(2, 400)),
        "c.parquet": table.getvalue(),
        "d.zip": archive.getvalue(),
        "e.jsonl.gz": gzip.compress(lines(4, 100)),
        "f.txt": texts(5, 1)[0].encode(),
    }


def read(folder: Path, uri: str, name: str = "corpus", **values: Any) -> dict[str, Any]:
    settings = IngestSettings(data_uri=uri, **values)
    ingest(settings, corpus=folder / name, report=folder / f"{name}.html")
    return plain(read_corpus(folder / name))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", BLOCK)


def put(prefix: str, contents: dict[str, bytes]) -> Any:
    client = s3_client()
    for name, raw in contents.items():
        client.put_object(Bucket="nudge", Key=f"{prefix}/{name}", Body=raw)
    return client


def test_a_store_that_fails_a_fifth_of_the_time_gives_the_same_corpus(
    store: Store, tmp_path: Path
) -> None:
    faults: tuple[Fault, ...] = ("500", "503", "reset", "cut-download")
    proxy = store(share=0.0, seed=11, retry_after_s=0, faults=faults)
    put("faults", objects())
    manifest = read(tmp_path, "s3://nudge/faults")
    assert manifest["dropped"] == {}
    assert manifest["documents"] == 400 * 3 + 400 + 100 + 1
    proxy.requests.clear()
    proxy.share = 0.2
    proxy.planned.extend(faults)  # each at least once, the rest by chance
    read(tmp_path, "s3://nudge/faults", "hurt")
    assert tree(tmp_path / "hurt") == tree(tmp_path / "corpus")
    assert proxy.hurt >= 8
    assert all(proxy.counts[fault] for fault in faults)
    assert all(path.startswith("/nudge") for _, path, _, _ in proxy.requests)  # path-style


def test_a_truncated_answer_is_resumed_at_its_offset(store: Store, tmp_path: Path) -> None:
    cut = 3  # slow answers first
    asked: list[int] = []

    def is_hurt(method: str, path: str) -> bool:
        return method == "GET" and path.startswith("/nudge/cut/")

    proxy = store(share=0.0, only=is_hurt)
    raw = lines(1, 2000)
    put("cut", {"a.jsonl": raw})
    proxy.requests.clear()
    planned: list[Fault] = ["slow", "slow", "slow", "cut-download", "cut-download"]
    proxy.planned.extend(planned)
    assert read(tmp_path, "s3://nudge/cut/a.jsonl")["documents"] == 2000
    assert proxy.counts["cut-download"] == 2
    for method, path, headers, _ in proxy.requests:
        if is_hurt(method, path):
            (start,) = re.findall(r"bytes=(\d+)-", headers["Range"])
            asked.append(int(start))
    assert len(set(asked)) >= len(raw) // (2 * BLOCK)
    # Each range follows the one before; only the truncated one is requested twice.
    assert asked == sorted(asked)
    again = Counter(asked)
    assert sum(again.values()) - len(again) == 2
    assert asked[cut] > 0
    assert again[asked[cut]] == 3


HOW = pytest.mark.parametrize("block", [BLOCK, 1 << 20], ids=["in ranges", "at once"])


@HOW
@pytest.mark.parametrize(
    ("changes", "expected"), [(1, {}), (99, {"changed_while_read": 1})], ids=["once", "always"]
)
def test_an_object_that_changes_while_it_is_read_is_never_mixed(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: int,
    expected: dict[str, int],
    block: int,
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    versions = [lines(seed, 300) for seed in range(20, 20 + sources.CHANGES + 1)]
    done = 0

    def change(method: str, path: str) -> bool:
        nonlocal done
        if method == "GET" and path.startswith("/nudge/moving/a") and done < changes:
            done += 1
            body = versions[done % len(versions)]
            client.put_object(Bucket="nudge", Key="moving/a.jsonl", Body=body)
        return False

    client: Any = None
    direct = os.environ.get("AWS_S3_ENDPOINT")
    proxy = store(only=change)
    os.environ["AWS_S3_ENDPOINT"] = proxy.upstream
    client = put("moving", {"a.jsonl": versions[0], "b.jsonl": lines(1, 50)})
    os.environ["AWS_S3_ENDPOINT"] = proxy.url
    assert direct != proxy.url
    manifest = read(tmp_path, "s3://nudge/moving")
    assert manifest["dropped"] == expected
    assert manifest["documents"] == (350 if changes == 1 else 50)
    assert manifest["documents_in"] == manifest["documents"] + sum(expected.values())
    if changes == 1:
        kept = read(tmp_path, "s3://nudge/moving", "after")
        assert tree(tmp_path / "after") == tree(tmp_path / "corpus")
        assert kept["documents"] == 350


@HOW
def test_an_object_that_vanishes_is_counted(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)

    def remove(method: str, path: str) -> bool:
        if method == "GET" and path.startswith("/nudge/going/a"):
            client.delete_object(Bucket="nudge", Key="going/a.jsonl")
        return False

    proxy = store(only=remove)
    os.environ["AWS_S3_ENDPOINT"] = proxy.upstream
    client = put("going", {"a.jsonl": lines(1, 300), "b.jsonl": lines(2, 50)})
    os.environ["AWS_S3_ENDPOINT"] = proxy.url
    manifest = read(tmp_path, "s3://nudge/going", state_uri=str(tmp_path / "state"))
    assert manifest["dropped"] == {"vanished": 1}
    assert manifest["documents"] == 50
    state = json.loads((tmp_path / "state" / "manifest.json").read_text())
    assert list(state["objects"]) == ["s3://nudge/going/b.jsonl"]


@pytest.mark.parametrize(
    ("variables", "uri", "message"),
    [
        ({}, "s3://nowhere/x", "there is no bucket 'nowhere' at http://127.0.0.1:"),
        ({}, "s3://nudge/nothing/*.jsonl", r"no file found; accepted are .*\.jsonl"),
        ({"AWS_SECRET_ACCESS_KEY": "no"}, "s3://nudge/x", "wrong; check AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "no"}, "s3://nudge/x", "not known there; check AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": None}, "s3://nudge/x", "not set; attach a data connection"),
        ({"AWS_S3_ENDPOINT": "http://127.0.0.1:9"}, "s3://nudge/x", "check AWS_S3_ENDPOINT"),
        ({"AWS_S3_ENDPOINT": "ftp://minio:9000"}, "s3://nudge/x", "expected http://host:port"),
    ],
)
def test_an_unusable_store_is_reported_in_one_sentence(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str | None],
    uri: str,
    message: str,
) -> None:
    store(share=0.0)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, uri)
    assert "\n" not in str(caught.value)
    assert secret == "no" or secret not in str(caught.value)


def test_a_store_with_a_private_ca(
    environment: dict[str, str],
    faulty_proxy: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    put("tls", {"a.jsonl": lines(1, 60)})
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    proxy = faulty_proxy(environment["AWS_S3_ENDPOINT"], share=0.0, tls=tls)
    monkeypatch.setenv("AWS_S3_ENDPOINT", proxy.url)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with pytest.raises(UserError, match="not trusted; set AWS_CA_BUNDLE to its CA's file"):
        read(tmp_path, "s3://nudge/tls")
    with pytest.raises(UserError, match="not trusted; set SSL_CERT_FILE to its CA's file"):
        read(tmp_path, f"{proxy.url}/nudge/tls/a.jsonl")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    assert read(tmp_path, "s3://nudge/tls")["documents"] == 60


def test_the_web_with_faults_without_ranges_and_without_a_length(
    faulty_proxy: Store, tmp_path: Path
) -> None:
    served = tmp_path / "web"
    served.mkdir()
    for name, raw in objects().items():
        (served / name).write_bytes(raw)
    manifest = read(tmp_path, str(served))
    names = list(objects())
    with Server(files(served), whole(served), streamed(served)) as server:
        proxy = faulty_proxy(server.url, share=0.2, seed=4, retry_after_s=0, slow_s=0.05)
        for kind, base in (
            ("files", proxy.url),
            ("whole", server.url),
            ("streamed", server.url),
        ):
            uris = " ".join(f"{base}/{kind}/{name}" for name in names)
            assert read(tmp_path, uris, kind)["fingerprint"] == manifest["fingerprint"]
        assert proxy.hurt >= 5
        with pytest.raises(UserError, match=r"/files/none.jsonl: there is no such file"):
            read(tmp_path, f"{server.url}/files/none.jsonl")


ODD = ["issue #12.md", "what?.txt", "C# notes.txt", "50% off&more;.txt", "a=b+c [1].txt"]


def odd_files() -> dict[str, bytes]:
    words = texts(6, len(ODD))
    return {name: text.encode() for name, text in zip(ODD, words, strict=True)}


def test_any_name_is_read_and_files_without_a_reader_are_named(
    store: Store, tmp_path: Path
) -> None:
    store(share=0.0)
    contents = {**odd_files(), "more.jsonl": lines(1, 60), "d.doc": b"x" * 99, "e.wri": b"x"}
    put("odd#1", contents)
    folder = tmp_path / "odd#1"
    folder.mkdir()
    for name, raw in contents.items():
        (folder / name).write_bytes(raw)
    for number, uri in enumerate((str(folder), f"file://{folder}", "s3://nudge/odd#1")):
        manifest = read(tmp_path, uri, str(number), state_uri=str(tmp_path / f"state{number}"))
        assert manifest["documents"] == 60 + len(ODD)
        assert manifest["dropped"] == {"unknown_kind": 2}
        dropped = {s["uri"].rpartition("/")[2]: s["dropped"] for s in manifest["sources"]}
        unknown = {"d.doc", "e.wri"}
        assert dropped == {n: {"unknown_kind": 1} if n in unknown else {} for n in contents}
        assert "2 unknown_kind (.doc .wri; .doc: soffice" in account(manifest)
        assert "odd#1/d.doc" in (tmp_path / f"{number}.html").read_text()
        assert len(find_sources(f"{uri}/*.txt")) == len(ODD) - 1
        with pytest.raises(UserError, match=r"d\.doc: unknown kind of file"):
            read(tmp_path, f"{uri}/*.*", "all")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.doc").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"none: no file found \(only 1 unknown_kind\); accepted are"
    ):
        read(tmp_path, str(tmp_path / "none"))
    # One file is one source, whatever its name and however many connections name it.
    both = f"{folder} file://{folder}/*.md s3://nudge/odd#1 s3://nudge/odd#1/more.*"
    assert len(find_sources(both)) == 2 * len(contents)


def test_a_name_in_a_bucket_wins_over_a_pattern_and_over_percent_20(store: Store) -> None:
    store(share=0.0)
    for folder, count in (("a[1]", 1), ("a1", 2), ("my texts", 3), ("half%20", 4)):
        put(f"names/{folder}", {f"{n}.txt": b"x" for n in range(count)})
    uris = {"a[1]": 1, "a[1]/0.txt": 1, "my texts": 3, "my%20texts": 3, "half%20": 4}
    found = {uri: len(find_sources(f"s3://nudge/names/{uri}")) for uri in uris}
    assert found == uris
    assert len(find_sources([f"s3://nudge/names/{uri}" for uri in ("a[1]", "my texts")])) == 4
    assert len(find_sources("s3://nudge/names/a[1-2]/*")) == 2


def test_urls_that_differ_in_their_query_are_two_objects(tmp_path: Path) -> None:
    for part in range(3):
        (tmp_path / f"{part}.jsonl").write_bytes(lines(part, 20))

    async def export(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(tmp_path / f"{request.query['part']}.jsonl")

    state = str(tmp_path / "state")
    with Server(("*", "/export.jsonl", export)) as server:
        parts = [f"{server.url}/export.jsonl?part={part}&key=secret" for part in range(3)]
        assert read(tmp_path, parts[1], state_uri=state)["documents"] == 20
        for _ in range(2):
            manifest = read(tmp_path, " ".join([*parts, parts[0]]), state_uri=state)
            assert manifest["documents"] == 60
        dropped = [source["uri"] for source in manifest["sources"]]
        assert dropped == [f"{server.url}/export.jsonl{number}" for number in ("", " (2)", " (3)")]
        # The first of several is not the same object as one that is alone under the same name.
        assert (
            read(tmp_path, parts[2], state_uri=state)["fingerprint"]
            == (read(tmp_path, str(tmp_path / "2.jsonl"), "file")["fingerprint"])
        )


@pytest.mark.long
def test_a_data_set_from_the_hub(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "data").mkdir(parents=True)
    for name, raw in objects().items():
        (copy / "data" / name).write_bytes(raw)
    manifest = read(tmp_path, str(copy / "data"))
    program = (
        "import sys; from pathlib import Path\n"
        "from nudge.components.ingest.ingest import ingest\n"
        "from nudge.components.ingest.settings import IngestSettings\n"
        "for name, uri in zip(('folder', 'glob'), sys.argv[1:]):\n"
        "    settings = IngestSettings(data_uri=uri, workers=1)\n"
        "    ingest(settings, corpus=Path(name), report=Path(name + '.html'))\n"
    )
    with Server(*hub(copy, "someone/texts")) as server:
        uris = ("hf://datasets/someone/texts/data", "hf://datasets/someone/texts/**/*.*")
        done = subprocess.run(
            [sys.executable, "-c", program, *uris],
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_ENDPOINT": server.url,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    for name in ("folder", "glob"):
        found = plain(read_corpus(tmp_path / name))
        assert found["fingerprint"] == manifest["fingerprint"]
        assert found["sources"][0]["uri"] == "hf://datasets/someone/texts/data/a.jsonl"
