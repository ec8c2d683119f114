"""Mixtures give what they say, and rows of like length share a batch."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from toolkit.data.batches import WINDOW, batch_order, padding_share, token_batches
from toolkit.data.mix import counts, draw, shares


def test_shares_follow_sizes_weights_and_temperature():
    assert shares([900, 100]) == pytest.approx([0.9, 0.1])
    assert shares([900, 100], [1, 3]) == pytest.approx([0.25, 0.75])
    assert shares([900, 100], temperature=2) == pytest.approx([0.75, 0.25])  # sqrt: 30 to 10
    assert shares([900, 100], temperature=1e9) == pytest.approx([0.5, 0.5])


def test_counts_add_up_and_are_nearest():
    rng = random.Random(0)
    for _ in range(200):
        parts = shares([1] * 7, [rng.random() for _ in range(7)])
        total = rng.randrange(1, 50)
        found = counts(parts, total)
        assert sum(found) == total
        assert all(abs(n - part * total) < 1 for n, part in zip(found, parts, strict=True))
    assert counts([0.25, 0.25, 0.5], 2) == [1, 0, 1]


def test_rows_repeat_evenly():
    times = Counter(draw(10, 34, random.Random(1)))
    assert sorted(times.values()) == [3] * 6 + [4] * 4
    assert sorted(draw(10, 10, random.Random(2))) == list(range(10))
    few = draw(1000, 5, random.Random(3))
    assert len(set(few)) == 5
    assert few == draw(1000, 5, random.Random(3)) != draw(1000, 5, random.Random(4))


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 16, 1001])
def test_each_row_comes_once_and_seeds_decide(by_length, rows):
    lengths = [random.Random(i).randrange(2, 90) for i in range(rows)]
    orders = [
        batch_order(lengths, 8, seed=seed, epoch=epoch, by_length=by_length)
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert all(sorted(order) == list(range(rows)) for order in orders)
    assert orders[0] == orders[1]
    if rows > 8:
        assert orders[0] != orders[2] != orders[3] != orders[0]


@pytest.mark.system("length_bucketing")
def test_padding_of_lognormal_lengths_falls_to_that_of_sorted_ones():
    """By hand with numpy: about 0.64 in random batches of 16, and 0.083 where all rows are sorted."""
    lengths = np.maximum(np.random.default_rng(0).lognormal(4, 1, 16 * WINDOW * 4).astype(int), 1)

    def by_hand(order) -> float:
        batches = lengths[order].reshape(-1, 16)
        return 1 - batches.sum() / (batches.max(axis=1) * 16).sum()

    random_order = batch_order(lengths.tolist(), 16, seed=0, epoch=0, by_length=False)
    bucketed = batch_order(lengths.tolist(), 16, seed=0, epoch=0, by_length=True)
    for order in (random_order, bucketed):
        batches = [order[start : start + 16] for start in range(0, len(order), 16)]
        assert padding_share(lengths.tolist(), batches) == pytest.approx(by_hand(order))
    assert by_hand(random_order) > 0.55
    assert by_hand(bucketed) < by_hand(np.argsort(lengths)) + 0.15
    assert by_hand(bucketed) < 0.2


def test_batches_come_in_random_order_and_what_is_left_over_last():
    lengths = list(range(1, 83))
    order = batch_order(lengths, 8, seed=0, epoch=0, by_length=True)
    longest = [max(lengths[i] for i in order[start : start + 8]) for start in range(0, 80, 8)]
    assert longest != sorted(longest, reverse=True)
    for start in range(0, 80, 8):
        batch = [lengths[i] for i in order[start : start + 8]]
        assert max(batch) - min(batch) < 8 + 3  # neighbours, but for the two that are left over
    assert len(order[80:]) == 2


@pytest.mark.system("length_bucketing")
@pytest.mark.parametrize("share", [1, 2, 3])
def test_batches_of_tokens_keep_their_budget_and_pad_as_little_as_sorted_rows(share):
    lengths = np.maximum(np.random.default_rng(1).lognormal(4, 1, 3000).astype(int), 1).tolist()
    budget = max(lengths) + 10
    batches = token_batches(lengths, budget, share=share, seed=0, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(3000))
    for batch in batches:
        for rank in range(share):
            mine = [lengths[row] for row in batch[rank::share]]
            assert max(lengths[row] for row in batch) * len(mine) <= budget
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.083
    # No two neighbours in length would fit into one batch, so there could hardly be fewer.
    assert len(batches) <= 1.1 * padded / (budget * share) + 1


@pytest.mark.system("length_bucketing")
def test_batches_of_tokens_come_in_an_order_that_seed_and_epoch_decide():
    lengths = [random.Random(i).randrange(2, 90) for i in range(500)]
    a, b, c = (token_batches(lengths, 200, share=1, seed=0, epoch=epoch) for epoch in (0, 0, 1))
    assert a == b != c
    assert sorted(map(sorted, a)) == sorted(map(sorted, c))
