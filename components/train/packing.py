"""Packing of conversations into rows: each one complete, in a row with room for it."""

import numpy as np


def pack(lengths: np.ndarray, room: int, seed: int) -> list[np.ndarray]:
    """Rows of conversations: for each row, the positions in ``lengths`` of those that share it.

    ``lengths`` are in tokens, int64 [n], each at most ``room``. Best fit, the longest first, with
    ties in an order that depends on the seed; the bound is 11/9 of the fewest possible rows, plus 4
    (Johnson et al., SIAM J. Comput. 3(4), 1974). A pure function of its arguments.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= room
    shuffled = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by their free tokens
    free = 0  # bit n is set while a row has n free tokens
    for position, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = free >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = with_room[left].pop()
            if not with_room[left]:
                free &= ~(1 << left)
            rows[row].append(position)
        else:
            left, row = room, len(rows)
            rows.append([position])
        left -= length
        with_room[left].append(row)
        free |= 1 << left
    return [np.array(row) for row in rows]
