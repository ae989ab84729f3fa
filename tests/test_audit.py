"""The audit of the pins: an advisory fails it, a reason or an outage does not."""

import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Osv(BaseHTTPRequestHandler):
    """Answers as api.osv.dev does; ``known`` has the advisories by package."""

    known: dict[str, list[str]]
    status: int

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        results: list[dict[str, Any]] = []
        for query in queries:
            ids = self.known.get(query["package"]["name"], [])
            start = int(query.get("page_token", 0))
            result = {"vulns": [{"id": each} for each in ids[start : start + 1]]} if ids else {}
            if start + 1 < len(ids):
                result["next_page_token"] = str(start + 1)  # type: ignore[assignment]
            results.append(result)
        body = json.dumps({"results": results}).encode()
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(body if self.status == 200 else b"busy")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ACCEPTED", tmp_path / "accepted.txt")
    (tmp_path / "accepted.txt").write_text("# why\n")
    Osv.known, Osv.status = {}, 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ADVISORIES_URL", f"http://127.0.0.1:{server.server_port}/")
    yield module
    server.shutdown()
    server.server_close()


def test_pins_without_advisories_pass(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main() == 0
    pins = audit.read_pins((ROOT / "constraints.txt").read_text())
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(pins) == sum("==" in line and not line.startswith("#") for line in lines)
    assert f"{len(pins)} pins audited, 0 advisories" in capsys.readouterr().out


def test_an_advisory_fails_until_it_is_accepted(
    audit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Osv.known = {"torch": ["GHSA-1", "PYSEC-2"]}
    assert audit.main() == 1
    told = capsys.readouterr()
    for advisory in ("GHSA-1", "PYSEC-2"):
        assert re.search(rf"^torch \S+: {advisory}$", told.out, re.MULTILINE)
    audit.ACCEPTED.write_text("GHSA-1 only where models are pickles\nPYSEC-2\n")
    assert audit.main() == 1  # an id without a reason accepts nothing
    assert "1 of them open" in capsys.readouterr().out
    audit.ACCEPTED.write_text("GHSA-1 only where models are pickles\nPYSEC-2 not on Linux\n")
    assert audit.main() == 0
    assert "accepted: not on Linux" in capsys.readouterr().out


def test_an_outage_is_said_and_is_no_finding(
    audit: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Osv.known, Osv.status = {"torch": ["GHSA-1"]}, 503
    assert audit.main() == 0
    assert "NOT AUDITED" in capsys.readouterr().err
    monkeypatch.setenv("ADVISORIES_URL", "http://127.0.0.1:1")
    assert audit.main() == 0
    assert "NOT AUDITED" in capsys.readouterr().err


def record(name: str, **said: Any) -> dict[str, Any]:
    affected = {"package": {"ecosystem": "PyPI", "name": name}, **said}
    return {"id": f"PYSEC-{name}", "modified": "2026-01-02T00:00:00Z", "affected": [affected]}


def events(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"ranges": [{"type": "ECOSYSTEM", "events": [{what: at} for what, at in pairs]}]}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"versions": ["1.9", "1.10"]}, True),
        ({"versions": ["1.9"]}, False),
        (events(("introduced", "0")), True),
        (events(("introduced", "0"), ("fixed", "1.10")), False),
        (events(("introduced", "0"), ("fixed", "1.10.1")), True),
        (events(("introduced", "1.10"), ("last_affected", "1.10")), True),
        (events(("introduced", "0"), ("last_affected", "1.9")), False),
        (events(("introduced", "1.11")), False),
        (events(("introduced", "0"), ("fixed", "1.2"), ("introduced", "1.9")), True),
    ],
)
def test_a_version_is_affected_as_osv_says(audit: Any, said: dict[str, Any], told: bool) -> None:
    assert audit.is_affected("1.10", said) is told


def test_a_folder_of_records_is_as_good_as_the_service(
    audit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "advisories"
    folder.mkdir()
    monkeypatch.setenv("ADVISORIES_URL", str(folder))
    assert audit.main() == 0
    assert "NOT AUDITED" in capsys.readouterr().err
    everything = events(("introduced", "0"))
    for name, body in {
        "a.json": record("Torch", **everything),
        "b.json": record("no-pin-of-ours", **everything),
        "c.json": {**record("numpy", **everything), "withdrawn": "2026-01-01T00:00:00Z"},
    }.items():
        (folder / name).write_text(json.dumps(body))
    (folder / "d.yaml").write_text(f"# YAML\n{json.dumps(record('jinja2', **everything))}")
    assert audit.main() == 1
    told = capsys.readouterr().out
    assert "3 advisories" in told
    assert "the newest of 2026-01-02" in told
    assert re.findall(r"^\S+ \S+: (\S+)$", told, re.MULTILINE) == ["PYSEC-jinja2", "PYSEC-Torch"]
