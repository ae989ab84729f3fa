"""Scheduled retraining, a tiny model: the first night, a night with nothing new, one that fails,
and nights with new text, until the oldest version is archived."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.nights import Nights


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in result["steps"]}


def made_from(result: dict[str, Any]) -> str:
    facts = json.loads((Path(result["model_path"]) / "nudge.json").read_text())
    return str(facts["base_model"]["uri"])


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nights(nights: Nights) -> None:
    first, same, failed = (nights.results[name] for name in ("first", "same", "failed"))
    assert first["promoted"]
    assert made_from(first) == str(nights.model)

    assert (same["promoted"], same["error"]) == (False, None)
    assert "no new text" in same["reason"]
    ran = {name for name, status in statuses(same).items() if status != "skipped"}
    assert ran == {"ingest", "summary"}
    page = (nights.home / "runs" / same["run_id"] / "summary.md").read_text()
    assert "there is no new text: the served version was trained on all of it" in page

    assert (failed["promoted"], statuses(failed)["upload"]) == (False, "failed")
    for name in ("first", "same", "failed"):
        shares = {version: row["share"] for version, row in nights.versions[name].items()}
        assert shares == {first["version"]: 100}, name

    promoted = [nights.results[name] for name in ("first", "second", "third", "fourth")]
    # After the fix, the rerun continued from what the failed night had made.
    assert statuses(promoted[1])["train"] == "reused"
    for before, night in itertools.pairwise(promoted):
        assert night["promoted"], night["reason"]
        assert made_from(night) == before["model_uri"]
    rows = nights.versions["fourth"]
    assert list(rows) == [night["version"] for night in promoted]
    assert [row["share"] for row in rows.values()] == [0, 0, 0, 100]
    # Of those that are older than the one kept, the one that was served when the newest came, and
    # its way back, stay.
    assert [row["state"] for row in rows.values()] == ["ARCHIVED", "LIVE", "LIVE", "LIVE"]
