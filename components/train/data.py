"""Token rows for training: documents packed end to end, in an order that is a pure function.

Positions restart at 0 for each document, which masks the documents before it in the row. Some
documents begin after a start token (`document_start_id`), as in pretraining, so that each of their
tokens is a target. The others begin bare, as a prompt does, and their first token is only context.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nudge.components.common.artifacts.tokens import TokenReader
from nudge.components.common.core.errors import UserError

IGNORED = -100
"""The target value of padding, which the loss ignores."""

ORDER_VERSION = 1
"""Increases when a code change makes the same settings give different rows."""


@dataclass(frozen=True)
class Rows:
    """A batch: inputs, targets and positions, each int64 [rows, length]."""

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor


class PackedSplit:
    """A split of a tokens artifact as rows of one length.

    A row depends only on the seed, the epoch and its index. ``prefix_share`` is the fraction of
    documents that begin after the token ``start``, by default the end-of-document token. Raises
    `UserError` if the split has no tokens.
    """

    def __init__(
        self,
        tokens: Path,
        split: str,
        length: int,
        seed: int,
        prefix_share: float = 1.0,
        start: int | None = None,
    ) -> None:
        self._reader = TokenReader(tokens, split)
        self._end = int(self._reader.manifest.end_of_document_id)
        self._start = self._end if start is None else start
        self._length, self._seed = length, seed
        self.tokens = self._reader.tokens
        self._bare_documents = round((1 - prefix_share) * self._reader.documents)
        self.targets = self.tokens - self._bare_documents
        if self.targets == 0:
            raise UserError(f"the {split} split of {tokens} has no tokens; ingest more text")
        self.rows = -(-self.targets // length)
        self._identity = {
            "order_version": ORDER_VERSION,
            "split": split,
            "length": length,
            "seed": seed,
            "prefix_share": prefix_share,
            "shards_sha256": self._reader.sha256,
        }
        if self._start != self._end:
            self._identity["document_start_id"] = self._start
        self._epoch = -1
        self._order = np.empty(0, np.int64)
        self._bare = np.empty(0, np.bool_)
        self._starts = np.empty(0, np.int64)

    def batch(self, epoch: int, first: int, rows: int) -> Rows:
        """``rows`` rows starting at row ``first``, continuing into the next epoch if needed."""
        if rows == 0:
            return Rows(*(torch.empty(0, self._length, dtype=torch.int64) for _ in range(3)))
        triples = [
            self._row(epoch + index // self.rows, index % self.rows)
            for index in range(first, first + rows)
        ]
        stacked = (torch.from_numpy(np.stack(part)) for part in zip(*triples, strict=True))
        return Rows(*stacked)

    def step_batch(self, step: int, batch_rows: int, rank: int = 0, ranks: int = 1) -> Rows:
        """The slice of the batch of ``step`` (counted from 0) that rank ``rank`` trains on.

        For any number of ranks, the concatenated slices equal the batch of a single rank. Their
        sizes differ by at most one row; with fewer rows than ranks, some are empty.
        """
        first, stop = (batch_rows * part // ranks for part in (rank, rank + 1))
        return self.batch(0, step * batch_rows + first, stop - first)

    def documents_of(self, rows: int) -> list[int]:
        """Sorted indices in the split of the documents with targets in the first ``rows`` rows."""
        self._shuffle(0)
        count = int(np.searchsorted(self._starts, min(rows * self._length, self.targets)))
        return sorted(self._order[:count].tolist())

    def cursor(self, rows_read: int) -> dict[str, Any]:
        """How far training has read, as plain JSON values for a checkpoint."""
        return {**self._identity, "rows_read": rows_read}

    def resume(self, cursor: dict[str, Any]) -> int:
        """The number of rows read so far, from a value that `cursor` returned.

        The number of ranks and the rows per batch may have changed since then. Raises `UserError`
        if the data or their order differ, so that no row is skipped or read twice.
        """
        changed = [key for key, value in self._identity.items() if cursor.get(key) != value]
        if changed:
            changes = ", ".join(
                f"{k} {cursor.get(k)!r}, now {self._identity[k]!r}" for k in changed
            )
            raise UserError(f"the checkpoint has other training data or another order: {changes}")
        return int(cursor["rows_read"])

    def _row(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._shuffle(epoch)
        inputs = np.full(self._length, self._end, np.int64)
        targets = np.full(self._length, IGNORED, np.int64)
        positions = np.zeros(self._length, np.int64)
        at, stop = index * self._length, min((index + 1) * self._length, self.targets)
        filled = 0
        while at + filled < stop:
            slot = int(np.searchsorted(self._starts, at + filled, side="right")) - 1
            document = self._reader.document(int(self._order[slot]))
            if not self._bare[slot]:
                document = np.concatenate(([self._start], document))
            begin = at + filled - int(self._starts[slot])
            count = min(len(document) - 1 - begin, stop - at - filled)
            span = slice(filled, filled + count)
            inputs[span] = document[begin : begin + count]
            targets[span] = document[begin + 1 : begin + 1 + count]
            positions[span] = np.arange(count)
            filled += count
        return inputs, targets, positions

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        self._order = generator.permutation(self._reader.documents)
        self._bare = generator.permutation(self._reader.documents) < self._bare_documents
        lengths = self._reader.lengths()[self._order] - self._bare
        self._starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        self._epoch = epoch
