"""Token rows for training, in an order that is a pure function of the seed.

Texts are packed end to end and may continue in the next row. A conversation is never cut: it is in
one row, which it shares with others that fit, or has to itself.

Positions restart at 0 for each document, which masks the documents before it in the row. Some texts
begin after a start token (`document_start_id`), as in pretraining, so that each of their tokens is
a target. The others begin bare, as a prompt does, and their first token is only context. So does a
conversation, whose only targets are its learned tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nudge.components.common.artifacts.tokens import TokenReader
from nudge.components.common.core.errors import UserError
from nudge.components.train.packing import pack

IGNORED = -100
"""The target value of padding, which the loss ignores."""

ORDER_VERSION, CONVERSATION_ORDER_VERSION = 1, 1
"""Increase when a code change makes the same settings give different rows."""


@dataclass(frozen=True)
class Rows:
    """A batch: inputs, targets and positions, each int64 [rows, length].

    ``learned`` is the number of targets that are not ignored, if it was counted.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    learned: int | None = None


def tokens_in(rows: Rows) -> int:
    """The number of input tokens in rows, without padding, which has position 0 and no target."""
    return int(((rows.positions > 0) | (rows.targets != IGNORED) | _begins(rows)).sum())


def _begins(rows: Rows) -> torch.Tensor:
    """Whether a token is the first of several in a document, bool [rows, length]."""
    return torch.nn.functional.pad(rows.positions[:, 1:] == 1, (0, 1))


def without_padding(rows: Rows) -> Rows:
    """The rows up to their last target; what follows changes no loss."""
    columns = (rows.targets != IGNORED).any(0).nonzero()
    used = int(columns[-1]) + 1 if len(columns) else 1
    return Rows(rows.inputs[:, :used], rows.targets[:, :used], rows.positions[:, :used])


class PackedSplit:
    """A split of a tokens artifact as rows of one length.

    A row depends only on the seed, the epoch and its index. ``prefix_share`` is the fraction of
    texts that begin after the token ``start``, by default the end-of-document token. Without
    ``packing``, each conversation has a row to itself. Raises `UserError` if the split has no
    tokens, or a conversation that is longer than a row.
    """

    def __init__(
        self,
        tokens: Path,
        split: str,
        length: int,
        seed: int,
        prefix_share: float = 1.0,
        start: int | None = None,
        packing: bool = True,
    ) -> None:
        self._reader = TokenReader(tokens, split)
        self._end = int(self._reader.manifest.end_of_document_id)
        self._start = self._end if start is None else start
        self._length, self._seed = length, seed
        self.tokens = self._reader.tokens
        chats = self._reader.span_counts() > 0
        self.conversations = int(chats.sum())
        self._texts = np.flatnonzero(~chats)
        self._text_lengths = self._reader.lengths()[self._texts]
        self._bare_texts = round((1 - prefix_share) * len(self._texts))
        self.targets = int(self._text_lengths.sum()) - self._bare_texts
        if self.targets == 0 and not self.conversations:
            raise UserError(f"the {split} split of {tokens} has no tokens; ingest more text")
        self._text_rows = -(-self.targets // length)
        self._chat_rows = self._pack(np.flatnonzero(chats), packing)
        self.rows = self._text_rows + len(self._chat_rows)
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
        if self.conversations:
            self._identity["conversation_order_version"] = CONVERSATION_ORDER_VERSION
            self._identity["packing"] = packing
        self._epoch = -1
        self._order = np.empty(0, np.int64)
        self._bare = np.empty(0, np.bool_)
        self._starts = np.empty(0, np.int64)
        self._slots = np.empty(0, np.int64)

    def _pack(self, chats: np.ndarray, packing: bool) -> list[np.ndarray]:
        """The conversations of each row, as indices in the split."""
        # Nothing learns from what follows the last learned token, so it is left out.
        lengths = self._reader.learned_ends()[chats] - 1
        if len(chats) and int(lengths.max()) > self._length:
            raise UserError(
                f"{int((lengths > self._length).sum())} conversations are longer than "
                f"train.sequence_length = {self._length}, up to {int(lengths.max())} tokens: raise "
                "it, or set tokenize.max_tokens so that they are shortened or dropped"
            )
        if not packing:
            return [chats[index : index + 1] for index in range(len(chats))]
        return [chats[row] for row in pack(lengths, self._length, self._seed)]

    def batch(self, epoch: int, first: int, rows: int) -> Rows:
        """``rows`` rows starting at row ``first``, continuing into the next epoch if needed."""
        if rows == 0:
            empty = torch.empty(0, self._length, dtype=torch.int64)
            return Rows(empty, empty, empty)
        triples = [
            self._row(epoch + index // self.rows, index % self.rows)
            for index in range(first, first + rows)
        ]
        inputs, targets, positions = (
            torch.from_numpy(np.stack(part)) for part in zip(*triples, strict=True)
        )
        return Rows(inputs, targets, positions)

    def step_batch(self, step: int, batch_rows: int, rank: int = 0, ranks: int = 1) -> Rows:
        """The slice of the batch of ``step`` (counted from 0) that rank ``rank`` trains on.

        For any number of ranks, the concatenated slices equal the batch of a single rank. Their
        sizes differ by at most one row; with fewer rows than ranks, some are empty.
        """
        first, stop = (batch_rows * part // ranks for part in (rank, rank + 1))
        return self.batch(0, step * batch_rows + first, stop - first)

    def documents_of(self, rows: int) -> list[int]:
        """Sorted positions in the corpus' split of the records with targets in the first ``rows``
        rows."""
        self._shuffle(0)
        found: set[int] = set()
        for slot in self._slots[:rows].tolist():
            if slot >= self._text_rows:
                found.update(self._chat_rows[slot - self._text_rows].tolist())
                continue
            ends = min((slot + 1) * self._length, self.targets)
            first = int(np.searchsorted(self._starts, slot * self._length, side="right")) - 1
            last = int(np.searchsorted(self._starts, ends))
            found.update(self._order[first:last].tolist())
        return sorted({self._reader.record(index) for index in found})

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
        slot = int(self._slots[index])
        if slot >= self._text_rows:
            self._fill_with_chats(slot - self._text_rows, inputs, targets, positions)
        else:
            self._fill_with_text(slot, inputs, targets, positions)
        return inputs, targets, positions

    def _fill_with_text(
        self, row: int, inputs: np.ndarray, targets: np.ndarray, positions: np.ndarray
    ) -> None:
        at, stop = row * self._length, min((row + 1) * self._length, self.targets)
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

    def _fill_with_chats(
        self, row: int, inputs: np.ndarray, targets: np.ndarray, positions: np.ndarray
    ) -> None:
        filled = 0
        for index in self._chat_rows[row].tolist():
            ids, spans = self._reader.document(index), self._reader.learned(index)
            count = int(spans[-1, 1]) - 1
            inputs[filled : filled + count] = ids[:count]
            positions[filled : filled + count] = np.arange(count)
            for begin, end in spans.tolist():
                # The target of a token is the next one. Nothing precedes a document's first token.
                begin = max(begin, 1)
                targets[filled + begin - 1 : filled + end - 1] = ids[begin:end]
            filled += count

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        order = generator.permutation(len(self._texts))
        self._bare = generator.permutation(len(self._texts)) < self._bare_texts
        self._order = self._texts[order]
        lengths = self._text_lengths[order] - self._bare
        self._starts = np.cumsum(lengths) - lengths
        self._slots = (
            generator.permutation(self.rows) if self.conversations else np.arange(self.rows)
        )
        self._epoch = epoch
