"""Artifacts: complete or invisible, and damage is detected."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import (
    published,
    read_manifest,
    sha256_file,
    sha256_tree,
    verify_file,
    write_atomic,
    write_manifest,
)


def test_a_finished_block_publishes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("one", "two"):
        with published(target) as part:
            (part / "file").write_text(text)
            assert not (target / "file").exists() or (target / "file").read_text() != text
    assert (target / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_block_keeps_the_earlier_content(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with published(target) as part:
        (part / "file").write_text("good")
    with pytest.raises(OSError, match="disk full"), published(target) as part:
        (part / "file").write_text("half")
        raise OSError("disk full")
    assert (target / "file").read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_process_publishes_nothing(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from nudge.components.common.core.publish import published
        with published(Path(sys.argv[1])) as part:
            (part / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()


def test_manifests_are_checked_for_format_version_and_json(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(UserError, match="is not a nudge.a artifact"):
        read_manifest(path, "nudge.a", 1)
    write_manifest(path, "nudge.a", 1, {"é": 1})
    assert read_manifest(path, "nudge.a", 1)["é"] == 1
    with pytest.raises(UserError, match="version 1, expected nudge.a version 2"):
        read_manifest(path, "nudge.a", 2)
    write_atomic(path, "{")
    with pytest.raises(UserError, match="not readable JSON"):
        read_manifest(path, "nudge.a", 1)


def test_a_flipped_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"abc")
    sha256 = sha256_file(path)
    verify_file(path, sha256)
    tree = sha256_tree(tmp_path)
    path.write_bytes(b"abd")
    assert sha256_tree(tmp_path) != tree
    with pytest.raises(UserError, match="damaged"):
        verify_file(path, sha256)
    os.unlink(path)
    with pytest.raises(UserError, match="missing"):
        verify_file(path, sha256)


@pytest.mark.parametrize(("in_pod", "mode"), [(False, 0o755), (True, 0o775)])
def test_a_group_can_write_only_in_a_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_pod: bool, mode: int
) -> None:
    """Even if the umask would allow it."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if in_pod:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    before = os.umask(0o002)
    try:
        with published(tmp_path / "made"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == mode
