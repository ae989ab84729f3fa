"""No secret is in anything that a run leaves: canaries are planted, then every byte is searched."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest
from aiohttp import web

from tests.nights import BESIDE, ENVIRONMENT, METADATA, NUDGE, Nights
from tests.web_server import Server


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


def test_a_step_shows_no_credentials_of_its_settings(tmp_path: Path) -> None:
    """A source of text with a user, a password and a signed query."""
    secrets = ["canary3Zw8Password", "canary3Zw8Signature"]
    lines = [json.dumps({"id": n, "text": f"text number {n} " * 20}) for n in range(40)]

    async def text(request: web.Request) -> web.Response:
        assert request.query["sig"] == secrets[1]
        return web.Response(text="\n".join(lines))

    home, made = tmp_path / "home", tmp_path / "made"
    with Server(("GET", "/text.jsonl", text)) as server:
        address = server.url.replace("http://", f"http://reader:{secrets[0]}@")
        (tmp_path / "r.yaml").write_text(
            f"name: r\nmodel_name: r\nbase_model: /no/base\n"
            f"ingest: {{data_uri: '{address}/text.jsonl?sig={secrets[1]}', workers: 1}}\n"
        )
        command = [NUDGE, "step", "ingest", "--recipe", str(tmp_path / "r.yaml")]
        done = subprocess.run(
            [*command, "--into", str(made)], env={**os.environ, "NUDGE_HOME": str(home)},
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (made / "corpus").is_dir()
    assert found_in(made, secrets, but=set()) == []
    assert found_in(home, secrets, but=set()) == []
    assert not [secret for secret in secrets if secret in done.stdout + done.stderr]
