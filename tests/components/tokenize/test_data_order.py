"""The order of the rows: a pure function of seed, epoch and step, on any number of ranks."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nudge.components.train.data import IGNORED, PackedSplit

Run = Callable[..., Path]
FEW = settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture
def tokens(run: Run) -> Path:
    """Tokens in four shards, so that rows cross shard boundaries."""
    return run()


@FEW
@given(
    length=st.integers(2, 700),
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 9),
    ranks=st.integers(1, 13),
    prefix_share=st.sampled_from([0.0, 0.3, 1.0]),
    data=st.data(),
)
def test_ranks_divide_the_batch_of_a_single_rank(
    tokens: Path, length: int, seed: int, batch: int, ranks: int, prefix_share: float,
    data: st.DataObject,
) -> None:  # fmt: skip
    alone = PackedSplit(tokens, "train", length, seed, prefix_share)
    # Up to the third epoch, with the steps in another order.
    last = 3 * alone.rows // batch
    for step in data.draw(st.lists(st.integers(0, last), min_size=1, max_size=3)):
        single = alone.batch(0, step * batch, batch)
        fresh = PackedSplit(tokens, "train", length, seed, prefix_share)
        parts = [fresh.step_batch(step, batch, rank, ranks) for rank in range(ranks)]
        for name in ("inputs", "targets", "positions"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(single, name))
        sizes = [len(part.inputs) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@FEW
@given(
    length=st.integers(16, 300),
    batches=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=2, max_size=4),
    data=st.data(),
)
def test_a_cursor_loses_and_repeats_nothing_when_the_ranks_change(
    tokens: Path, length: int, batches: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Each part of the run resumes with another number of ranks and another batch size."""
    read, targets = 0, []
    for batch, ranks in batches:
        split = PackedSplit(tokens, "train", length, 3)
        read = split.resume(split.cursor(read))
        for _ in range(data.draw(st.integers(1, 6))):
            cuts = [batch * part // ranks for part in range(ranks + 1)]
            for first, stop in itertools.pairwise(cuts):
                targets.append(split.batch(0, read + first, stop - first).targets)
            read += batch
    straight = PackedSplit(tokens, "train", length, 3).batch(0, 0, read).targets
    assert torch.equal(torch.cat(targets), straight)


@pytest.mark.parametrize("length", [100, 1000])
def test_an_epoch_has_each_token_once_across_shards(tokens: Path, length: int) -> None:
    split = PackedSplit(tokens, "train", length, 5)

    def tokens_of(epoch: int) -> Iterator[int]:
        for index in range(split.rows):
            row = split.batch(epoch, index, 1).targets
            yield from row[row != IGNORED].tolist()

    first, second = sorted(tokens_of(0)), sorted(tokens_of(1))
    assert first == second
    assert len(first) == split.tokens
