"""The audit of the locked packages: an advisory fails it; a reason or an outage does not."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Osv(BaseHTTPRequestHandler):
    """Answers as https://google.github.io/osv.dev/post-v1-query/ says."""

    known: dict[str, list[str]]
    asked: set[str]

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.asked.add(name)
        affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "versions": ["0"]}]
        found = [{"id": each, "affected": affected} for each in self.known.get(name, [])]
        body = json.dumps({"vulns": found} if found else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ACCEPTED", tmp_path / "accepted.txt")
    (tmp_path / "accepted.txt").write_text("# why\n")
    return module


@pytest.fixture
def osv() -> Iterator[list[str]]:
    """The arguments by which pip-audit asks a service of ours."""
    Osv.known, Osv.asked = {}, set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ["-s", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/v1/query"]
    server.shutdown()
    server.server_close()


def test_every_locked_package_is_audited(
    audit: Any, osv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(osv) == 0
    assert {"torch", "pydantic", "kfp", "cyclonedx-bom"} <= Osv.asked
    assert f"{len(Osv.asked)} packages audited, 0 unknown" in capsys.readouterr().out


def test_an_advisory_fails_until_it_is_accepted(
    audit: Any, osv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Osv.known = {"torch": ["GHSA-1", "PYSEC-2"]}
    assert audit.main(osv) == 1
    printed = capsys.readouterr().out
    assert "GHSA-1" in printed
    assert "PYSEC-2" in printed
    audit.ACCEPTED.write_text("GHSA-1 only where models are pickles\nPYSEC-2 not on Linux\n")
    assert audit.main(osv) == 0
    assert "accepted: not on Linux" in capsys.readouterr().out


def test_an_id_without_a_reason_accepts_nothing(audit: Any) -> None:
    assert audit.read_accepted("# why\nGHSA-1 a reason\nPYSEC-2\n") == {"GHSA-1": "a reason"}


def test_an_outage_is_reported_and_is_not_a_finding(
    audit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(["-s", "osv", "--osv-url", "http://127.0.0.1:1/v1/query"]) == 0
    assert "NOT AUDITED" in capsys.readouterr().err


def test_a_service_that_knows_no_package_has_audited_nothing(
    audit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"dependencies": [{"name": "torch", "skip_reason": "Dependency not found on PyPI"}]}
    assert audit.judge(answer, {}) == 0
    assert "NOT AUDITED" in capsys.readouterr().err
