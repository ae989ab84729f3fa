"""The embedded registry replays a recording of the real one, row by row.

registry.jsonl holds requests to the Model Registry (commit bd07139, 2026-04-29), in order, with its
answers on PostgreSQL 15 and on MariaDB 10.11. ``{name}`` in a path and ``<<name>>`` in a body stand
for ids that earlier rows saved.
"""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.registry_server import registry_server

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "registry.jsonl").read_text(encoding="utf-8").splitlines()
]
NOT_SERVED = re.compile(
    r"filterQuery|^/experiment|/serves$|^/inference_services/[^/]+/(model|version)$"
    r"|^/serving_environments/[^/]+/inference_services$"
)
"""What neither nudge nor the unmodified client uses, and filter queries."""
ABSOLUTE = re.compile(r"^/(api|health|readyz)\b")


def send(client: httpx.Client, row: dict[str, Any], ids: dict[str, str]) -> httpx.Response:
    path = re.sub(r"\{(\w+)\}", lambda match: ids[match[1]], row["path"])
    if not ABSOLUTE.match(path):
        path = f"/api/model_registry/v1alpha3{path}"
    content = row.get("raw")
    if content is None and "body" in row:
        content = re.sub(r"<<(\w+)>>", lambda match: ids[match[1]], json.dumps(row["body"]))
    headers = {"Content-Type": "application/json", **row.get("headers", {})}
    return client.request(row["method"], path, content=content, headers=headers)


def plain(body: Any) -> Any:
    """What two servers' answers have in common: neither ids nor times, nor the order of keys."""
    if isinstance(body, dict):
        left_out = r".*(Id|id|SinceEpoch)|name|nextPageToken|size|pageSize"
        return {key: plain(each) for key, each in body.items() if not re.fullmatch(left_out, key)}
    return [plain(each) for each in body] if isinstance(body, list) else body


@pytest.mark.parametrize("database", ["postgresql", "mariadb"])
def test_every_row_gets_the_answer_of_that_database(tmp_path: Path, database: str) -> None:
    ids: dict[str, str] = {}
    different = []
    compared = 0
    served = registry_server(tmp_path, database, ("v1alpha3",))
    with served as url, httpx.Client(base_url=url, timeout=30) as client:
        for row in ROWS:
            if NOT_SERVED.search(row["path"]):
                continue
            answer, expected = send(client, row, ids), row[database]
            if "save" in row and answer.status_code < 300:
                ids[row["save"]] = answer.json()["id"]
            elif "save" in row:
                ids[row["save"]] = "none"
            compared += 1
            seen: list[Any] = [answer.status_code]
            wanted: list[Any] = [expected["status"]]
            if answer.status_code >= 400:
                own = "json" in answer.headers.get("content-type", "")
                seen.append(answer.json()["code"] if own else None)
                body = expected["body"]
                wanted.append(body["code"] if isinstance(body, dict) else None)
            elif isinstance(expected.get("body"), dict):
                seen.append(plain(answer.json()))
                wanted.append(plain(expected["body"]))
            if "allow" in expected:
                seen.append(answer.headers["Allow"])
                # The two runs of the real server differ where a path has two methods.
                wanted.append({row[each]["allow"] for each in ("postgresql", "mariadb")})
                wanted[-1] = seen[-1] if seen[-1] in wanted[-1] else wanted[-1]
            if seen != wanted:
                different.append((row["n"], row["label"], seen, wanted))
    assert different == []
    assert compared > 220
