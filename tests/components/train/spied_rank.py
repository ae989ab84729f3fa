"""A rank that logs the rows on which it trains, so that tests can check their order directly.

``python -m tests.components.train.spied_rank`` runs ``python -m nudge.components.train``; a Ray
worker calls `install` first. Each rank appends to its own file in the folder NUDGE_TEST_ROWS.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from nudge.components.train.data import PackedSplit

VARIABLE = "NUDGE_TEST_ROWS"


def environment(folder: Path) -> dict[str, str]:
    """The variables for a process that writes its rows to ``folder``."""
    return {VARIABLE: str(folder), "PYTHONPATH": str(Path(__file__).parents[3])}


def install() -> None:
    from nudge.components.train import loop

    original = loop.rank_rows

    def spied(split: PackedSplit, step: int, count: int, ranks: Any) -> Any:
        rows = original(split, step, count, ranks)
        line = [split.cursor(0)["split"], step, rows.targets.tolist()]
        with (Path(os.environ[VARIABLE]) / f"{ranks.rank}.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        return rows

    loop.rank_rows = spied


def check_order(folder: Path, tokens: Path, ranks: int, steps: int, rows: int) -> None:
    """Assert that the concatenated slices of each step equal the batch of a single rank."""
    found: list[dict[int, list[list[int]]]] = []
    for rank in range(ranks):
        lines = map(json.loads, (folder / f"{rank}.jsonl").read_text().splitlines())
        found.append({step: part for split, step, part in lines if split == "train"})
    alone = PackedSplit(tokens, "train", 16, seed=1)
    for step in range(steps):
        whole = alone.step_batch(step, rows).targets.tolist()
        assert [row for rank in found for row in rank[step]] == whole
    assert all(rank.keys() == set(range(steps)) for rank in found)


if __name__ == "__main__":
    from nudge.components.train.__main__ import main

    install()
    sys.exit(main())
