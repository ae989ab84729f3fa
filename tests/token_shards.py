"""Writes a shard of tokens from arrays of ids."""

from pathlib import Path
from typing import Any

import numpy as np

from nudge.components.common.artifacts.tokens import NO_SPANS, ShardWriter


def write_shard(
    path: Path,
    documents: list[np.ndarray],
    dtype: np.dtype[Any],
    learned: list[np.ndarray] | None = None,
) -> None:
    """Write documents, each an integer array of ids, as one shard; ids must fit ``dtype``.

    ``learned`` has the learned spans of each document, [spans, 2]: none for text.
    """
    with path.open("wb") as file:
        writer = ShardWriter(file, dtype)
        for document, spans in zip(documents, learned or [NO_SPANS] * len(documents), strict=True):
            assert document.size == 0 or int(document.max()) <= np.iinfo(dtype).max
            ids, length = document.astype(dtype).tobytes(), np.array([len(document)])
            writer.append(ids, length, np.array([len(spans)]), spans)
        writer.finish()
