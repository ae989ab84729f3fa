"""The handover folder of a launcher and a job's pods, also in an object store that fails."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_tree
from nudge.components.train.cluster.handover import Handover, idle_folders
from tests.faulty_proxy import FaultyProxy


def test_an_idle_folder_of_a_job_is_found(tmp_path: Path) -> None:
    for name in ("nudge-old-0123abcd", "nudge-new-0123abcd", "someone-elses"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "one").write_text("x")
    for path in (tmp_path / "nudge-old-0123abcd", tmp_path / "someone-elses"):
        for each in (path, path / "checkpoints", path / "checkpoints" / "one"):
            os.utime(each, (1, 1))
    assert idle_folders(str(tmp_path), 3600) == ["nudge-old-0123abcd"]


def test_checkpoints_can_be_kept(tmp_path: Path) -> None:
    handover = Handover(str(tmp_path / "shared"))
    (tmp_path / "recipe").write_text("{}")
    handover.send("recipe", tmp_path / "recipe")
    (tmp_path / "shared" / "checkpoints").mkdir()
    handover.clear(keep_checkpoints=True)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["checkpoints"]
    handover.clear()
    assert not (tmp_path / "shared").exists()


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("abc")
    handover = Handover(str(tmp_path / "shared"))
    with pytest.raises(UserError, match="has no complete model"):
        handover.fetch("model", tmp_path / "out")
    handover.send("model", tmp_path / "in")
    (tmp_path / "shared" / "model" / "a").write_text("abd")
    with pytest.raises(UserError, match="is damaged"):
        handover.fetch("model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_listing_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("abc")
    handover = Handover(str(tmp_path / "shared"))
    handover.send("recipe", tmp_path / "secret")
    listing = tmp_path / "shared" / "recipe.json"
    listing.write_text(listing.read_text().replace('"secret"', '"../../secret"'))
    with pytest.raises(UserError, match="which is not inside it"):
        handover.fetch("recipe", tmp_path / "out")


def test_an_object_store_that_fails_carries_the_same_bytes(
    tokens: Path,
    tmp_path: Path,
    connected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    faulty_proxy: Callable[..., FaultyProxy],
) -> None:
    from nudge.components.common.clients.storage import s3_client
    from tests.objects import list_keys

    proxy = faulty_proxy(connected["AWS_S3_ENDPOINT"], share=0.2, seed=5, slow_s=0.01)
    monkeypatch.setenv("AWS_S3_ENDPOINT", proxy.url)
    handover = Handover("s3://nudge/jobs/one")
    assert handover.read("tokens") is None
    (tmp_path / "recipe").write_text("{}")
    handover.send("recipe", tmp_path / "recipe")
    handover.send("tokens", tokens)
    handover.fetch("recipe", tmp_path / "back" / "recipe")
    handover.fetch("tokens", tmp_path / "back" / "tokens")
    assert (tmp_path / "back" / "recipe").read_text() == "{}"
    assert sha256_tree(tmp_path / "back" / "tokens") == sha256_tree(tokens)
    assert sum(proxy.counts.values()) > proxy.counts["passed"]
    client = s3_client()
    client.put_object(Bucket="nudge", Key="jobs/one/tokens/train.bin", Body=b"other")
    with pytest.raises(UserError, match="is damaged"):
        handover.fetch("tokens", tmp_path / "again")
    Handover("s3://nudge/jobs/one-more").send("recipe", tmp_path / "recipe")
    Handover("s3://nudge/jobs/nudge-x-0123abcd").send("recipe", tmp_path / "recipe")
    assert idle_folders("s3://nudge/jobs", -3600) == ["nudge-x-0123abcd"]
    assert idle_folders("s3://nudge/jobs", 3600) == []
    client.put_object(Bucket="nudge", Key="jobs/one/checkpoints/a", Body=b"x")
    handover.clear(keep_checkpoints=True)
    assert list(list_keys(client, "nudge", "jobs/one")) == ["jobs/one/checkpoints/a"]
    handover.clear()
    assert list_keys(client, "nudge", "jobs/one") == {}
    assert list_keys(client, "nudge", "jobs/one-more")
