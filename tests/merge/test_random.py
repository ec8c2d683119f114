"""The random numbers of masks: what they are computed from, that they are uniform, that nothing else shows in them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pytest

from toolkit.merge.random import Draws

BLOCK = 1 << 16
KEYS = [Draws(seed, name, model) for seed in (0, 1, 12345) for name in ("a.weight", "b.weight") for model in (0, 1)]


def z_of_chi_square(counts: np.ndarray) -> float:
    """Return by how many standard deviations the chi-square of counts that should be equal misses its mean."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - degrees) / np.sqrt(2 * degrees))


def z_of_pairs(a: np.ndarray, b: np.ndarray, shift: int = 28) -> float:
    """Return the same for the 256 pairs of four bits of each of two sequences."""
    pairs = (a >> shift & 15) * 16 + (b >> shift & 15)
    return z_of_chi_square(np.bincount(pairs, minlength=256))


def hash_of(seed: int, name: str, model: int, element: int) -> int:
    """Compute one number with Python's own integers."""
    text = f"{seed}\0{name}\0{model}\0{element // BLOCK}"
    digest = blake2b(text.encode(), digest_size=8).digest()
    stride, offset = int.from_bytes(digest[:4], "little") | 1, int.from_bytes(digest[4:], "little")
    x = (element % BLOCK * stride + offset) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_bits_are_the_documented_hash():
    draws = Draws(7, "model.norm.weight", 2)
    got = draws.bits(0, 3 * BLOCK)
    for element in (0, 1, 2, 1000, BLOCK - 1, BLOCK, 2 * BLOCK + 77, 3 * BLOCK - 1):
        assert got[element] == hash_of(7, "model.norm.weight", 2, element)


@pytest.mark.parametrize(
    "cuts", [(0, 10, 70_000, 200_000), (0, BLOCK, 2 * BLOCK, 200_000), (0, 65_535, 65_537, 200_000)]
)
def test_slices_do_not_matter(cuts):
    draws = Draws(0, "a", 0)
    whole = draws.bits(0, 200_000)
    parts = [draws.bits(start, stop) for start, stop in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    masks = [draws.below(0.3, start, stop) for start, stop in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(masks), whole / 2**32 < 0.3)


def test_bits_go_where_they_are_asked_to():
    out = np.empty(1000, np.uint32)
    assert Draws(0, "a", 0).bits(500, 1500, out) is out
    np.testing.assert_array_equal(out, Draws(0, "a", 0).bits(0, 2000)[500:1500])


def test_threads_do_not_disturb_each_other():
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda draws: draws.bits(0, 5 * BLOCK), KEYS * 4))
    for bits, draws in zip(got, KEYS * 4, strict=True):
        np.testing.assert_array_equal(bits, draws.bits(0, 5 * BLOCK))


@pytest.mark.parametrize("probability", [0.0, 2.0**-32, 0.1, 0.5, 1 - 2.0**-32, 1.0])
def test_below(probability):
    draws = Draws(3, "a", 1)
    expected = draws.bits(0, 100_000).astype(np.float64) / 2**32 < probability
    np.testing.assert_array_equal(draws.below(probability, 0, 100_000), expected)


@pytest.mark.parametrize("draws", KEYS, ids=str)
def test_uniform(draws):
    bits = draws.bits(0, 40 * BLOCK)
    for shift in (0, 8, 16, 24):
        assert abs(z_of_chi_square(np.bincount(bits >> shift & 255, minlength=256))) < 5
    # In every block as well, since a block has keys of its own.
    for block in bits.reshape(40, BLOCK):
        assert abs(z_of_chi_square(np.bincount(block >> 24, minlength=256))) < 6


def test_share_below_a_probability():
    for probability in (0.001, 0.1, 0.5, 0.9):
        kept = np.array([np.count_nonzero(d.below(probability, 0, 40 * BLOCK)) for d in KEYS])
        spread = np.sqrt(40 * BLOCK * probability * (1 - probability))
        assert (np.abs(kept - 40 * BLOCK * probability) < 5 * spread).all()


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, 1024, 4096, BLOCK // 2, BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("shift", [0, 14, 28])
def test_neighbours_rows_and_blocks_are_independent(lag, shift):
    bits = KEYS[0].bits(0, 40 * BLOCK)
    assert abs(z_of_pairs(bits[:-lag], bits[lag:], shift)) < 5


def test_models_tensors_and_seeds_are_independent():
    bits = [draws.bits(0, 10 * BLOCK) for draws in KEYS]
    for i, a in enumerate(bits):
        for b in bits[:i]:
            assert abs(z_of_pairs(a, b)) < 5
            assert abs(z_of_pairs(a, b, 0)) < 5


def test_names_and_numbers_do_not_run_into_each_other():
    assert not np.array_equal(Draws(1, "1", 1).bits(0, 8), Draws(11, "", 1).bits(0, 8))
    assert not np.array_equal(Draws(0, "a1", 0).bits(0, 8), Draws(0, "a", 10).bits(0, 8))
