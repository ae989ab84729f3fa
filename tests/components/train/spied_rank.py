"""A rank that writes down the rows which it trains on: the order itself, not what follows from it.

``python -m tests.components.train.spied_rank`` is ``python -m nudge.components.train``; a worker of
Ray calls `install` first. Each rank appends to a file of its own in the folder NUDGE_TEST_ROWS.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from nudge.components.train.data import PackedSplit

VARIABLE = "NUDGE_TEST_ROWS"


def environment(folder: Path) -> dict[str, str]:
    """What a process needs that writes its rows to ``folder``."""
    return {VARIABLE: str(folder), "PYTHONPATH": str(Path(__file__).parents[3])}


def install() -> None:
    from nudge.components.train import loop

    given = loop.rank_rows

    def spied(split: PackedSplit, step: int, count: int, ranks: Any) -> Any:
        rows = given(split, step, count, ranks)
        line = [split.cursor(0)["split"], step, rows.targets.tolist()]
        with (Path(os.environ[VARIABLE]) / f"{ranks.rank}.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        return rows

    loop.rank_rows = spied


def check_order(folder: Path, tokens: Path, ranks: int, steps: int, rows: int) -> None:
    """Assert that the ranks' parts of each step, put together, are the batch of a single rank."""
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
