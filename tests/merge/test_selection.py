"""The largest elements of a vector, and its order statistics, against sorting."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merge.laws import Arrays
from toolkit.merge.selection import ALL, NONE, _cut_by_histogram, largest, order_statistics

RNG = np.random.default_rng(0)

KINDS = {
    "normal": lambda n: RNG.standard_normal(n),
    "grid": lambda n: RNG.integers(-8, 9, n) / 8,
    "fine grid": lambda n: RNG.integers(-300, 301, n) / 256,
    "constant": lambda n: np.full(n, 0.25),
    "two values": lambda n: np.where(RNG.random(n) < 0.5, 0.25, -1.0),
    "heavy tails": lambda n: RNG.standard_cauchy(n),
    "one outlier": lambda n: np.where(np.arange(n) == n // 2, 1e30, 1e-30),
    "sorted": lambda n: np.arange(n) / n,
    "half zeros": lambda n: np.maximum(RNG.standard_normal(n), 0),
}


def kept_by(cut, x):
    bits = np.abs(x).view(np.uint32)
    return (bits > cut.threshold) | ((bits == cut.threshold) & (np.arange(len(x)) <= cut.last))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 63, 1000, 200_000])
def test_cut_keeps_exactly_the_largest(kind, count):
    tensor = Arrays(np.stack([KINDS[kind](count), KINDS["normal"](count)]))
    wanted = [sorted({1, count // 10, count // 2, count - 1, count} - {0}), [count // 3]]
    cuts = largest(tensor.stacked, count, wanted)
    assert [len(of_row) for of_row in cuts] == [len(numbers) for numbers in wanted]
    for row, (x, numbers) in enumerate(zip(tensor.x, wanted, strict=True)):
        order = np.lexsort((np.arange(count), -np.abs(x)))
        for keep, cut in zip(numbers, cuts[row], strict=True):
            expected = np.zeros(count, bool)
            expected[order[:keep]] = True
            if keep == count:
                assert cut is ALL
            elif keep == 0:
                assert cut is NONE
            else:
                np.testing.assert_array_equal(kept_by(cut, x), expected)
                assert _cut_by_histogram(tensor.stacked, row, keep) == cut
            for start, chunk in tensor.stacked():
                here = expected[start : start + chunk.shape[1]]
                whole = chunk[row].copy()
                cut.drop(chunk[row], start)
                np.testing.assert_array_equal(chunk[row], np.where(here, whole, 0))


def test_a_sample_that_misleads_costs_time_and_not_the_result():
    """Every 16th slice is sampled, and none of them holds what the other slices hold."""
    count = 64 * 65536 * 16
    x = np.zeros((1, count), np.float32)
    x.reshape(-1, 65536)[1::16] = np.linspace(1, 2, 65536, dtype=np.float32)
    ((cut,),) = largest(Arrays(x).stacked, count, [[100_000]])
    expected = np.partition(x[0], count - 100_000)[count - 100_000]
    assert np.uint32(cut.threshold).view(np.float32) == expected
    assert kept_by(cut, x[0]).sum() == 100_000


@pytest.mark.parametrize("kind", ["normal", "grid", "zeros", "tiny"])
@pytest.mark.parametrize("count", [1, 2, 5, 1000, 200_000])
def test_order_statistics_are_those_of_a_sort(kind, count):
    x = np.abs(RNG.standard_normal(count)).astype(np.float32)
    x = {"normal": x, "grid": np.round(x * 4) / 4, "zeros": x * (x > 1), "tiny": x * np.float32(1e-41)}[kind]
    ranks = [0, count // 4, count // 2, count - 1, count // 4]
    found = order_statistics(Arrays(x[None]).stacked, ranks)
    assert found == np.sort(x)[ranks].tolist()
