"""What a launcher and a job's pods hand each other, through an object store that fails."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_tree
from nudge.components.train.cluster.handover import Exchange
from tests.faulty_proxy import FaultyProxy


def test_what_is_damaged_on_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("abc")
    exchange = Exchange(str(tmp_path / "shared"))
    with pytest.raises(UserError, match="holds no complete model"):
        exchange.fetch("model", tmp_path / "out")
    exchange.send("model", tmp_path / "in")
    (tmp_path / "shared" / "model" / "a").write_text("abd")
    with pytest.raises(UserError, match="is damaged"):
        exchange.fetch("model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_object_store_that_fails_carries_the_same_bytes(
    tokens: Path,
    tmp_path: Path,
    connected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    faulty_proxy: Callable[..., FaultyProxy],
) -> None:
    from nudge.components.common.clients.storage import list_keys, s3_client

    proxy = faulty_proxy(connected["AWS_S3_ENDPOINT"], share=0.2, seed=5, slow_s=0.01)
    monkeypatch.setenv("AWS_S3_ENDPOINT", proxy.url)
    exchange = Exchange("s3://nudge/jobs/one")
    assert exchange.read("tokens") is None
    (tmp_path / "recipe").write_text("{}")
    exchange.send("recipe", tmp_path / "recipe")
    exchange.send("tokens", tokens)
    exchange.fetch("recipe", tmp_path / "back" / "recipe")
    exchange.fetch("tokens", tmp_path / "back" / "tokens")
    assert (tmp_path / "back" / "recipe").read_text() == "{}"
    assert sha256_tree(tmp_path / "back" / "tokens") == sha256_tree(tokens)
    assert sum(proxy.counts.values()) > proxy.counts["passed"]
    client = s3_client()
    client.put_object(Bucket="nudge", Key="jobs/one/tokens/train.bin", Body=b"other")
    with pytest.raises(UserError, match="is damaged"):
        exchange.fetch("tokens", tmp_path / "again")
    Exchange("s3://nudge/jobs/one-more").send("recipe", tmp_path / "recipe")
    exchange.clear()
    assert list_keys(client, "nudge", "jobs/one") == {}
    assert list_keys(client, "nudge", "jobs/one-more")
