"""No secret is in anything that a run leaves: canaries are planted, then every byte is searched."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.nights import BESIDE, ENVIRONMENT, METADATA, NUDGE, Nights


def found_in(folder: Path, secrets: list[str], but: set[Path]) -> list[str]:
    """The files below a folder, packed ones unpacked, that hold one of the secrets."""
    needles = [secret.encode() for secret in secrets]
    found = []
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and each not in but):
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if any(needle in content for needle in needles):
            found.append(str(path.relative_to(folder)))
    return found


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nothing_that_a_run_leaves_holds_a_secret(nights: Nights) -> None:
    left = nights.home
    credentials = left / "services" / "credentials"
    keys = json.loads(credentials.read_text())
    secrets = [*ENVIRONMENT.values(), *BESIDE.values(), METADATA, keys["AWS_SECRET_ACCESS_KEY"]]
    assert found_in(left, secrets, but={credentials}) == []
    assert credentials.stat().st_mode & 0o077 == 0
    for name in ("runs", "model-registry", "object-store", "services", "reuse"):
        assert any((left / name).rglob("*")), name  # the search had something to search


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_search_would_find_one(nights: Nights) -> None:
    planted = nights.home / "runs" / "planted.log.gz"
    planted.write_bytes(gzip.compress(f"token {METADATA}".encode()))
    try:
        assert found_in(nights.home, [METADATA], but=set()) == ["runs/planted.log.gz"]
    finally:
        planted.unlink()


def test_nothing_compiled_holds_what_is_in_the_environment(tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT, "AWS_SECRET_ACCESS_KEY": METADATA}
    command = [NUDGE, "compile", "--into", str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert list(tmp_path.rglob("*.yaml"))
    assert found_in(tmp_path, [*ENVIRONMENT.values(), METADATA], but=set()) == []
