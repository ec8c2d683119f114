"""Primitives of merge methods against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from tests.merge.laws import Arrays
from toolkit.checkpoints import deltas
from toolkit.merge.ops import (
    cosines,
    gram,
    merge_matrices,
    norm_ratios,
    thin_svd,
)

RNG = np.random.default_rng(0)


def test_gram_is_that_of_float64(monkeypatch):
    x = RNG.standard_normal((4, 30, 7)).astype(np.float32)
    flat = x.reshape(4, -1).astype(np.float64)
    for chunk in (7, 64, 65536):
        monkeypatch.setattr(deltas, "CHUNK", chunk)
        np.testing.assert_allclose(gram(Arrays(x)), flat @ flat.T, rtol=1e-12)


def test_cosines():
    x = RNG.standard_normal((5, 3, 20)) * np.array([1e-20, 1.0, 1e10])[:, None]
    x[2, 1] = 0
    norms, found = cosines(np.einsum("rik,rjk->rij", x, x))
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=-1), rtol=1e-12)
    for row in range(5):
        for i in range(3):
            for j in range(3):
                a, b = x[row, i], x[row, j]
                expected = a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0.0
                assert found[row, i, j] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert np.abs(found).max() <= 1


def test_norm_ratio():
    x = RNG.standard_normal((2, 150_000)).astype(np.float32)

    def drop(values: np.ndarray, start: int) -> None:
        values[(np.arange(start, start + len(values)) % 3) > 0] = 0

    wide = np.abs(x[1].astype(np.float64))
    assert norm_ratios(Arrays(x), [None, drop]) == pytest.approx([1, wide.sum() / wide[::3].sum()], rel=3e-7)
    assert norm_ratios(Arrays(x), [None, lambda values, start: values.fill(0)]) == [1, 1]


def test_norm_ratio_fits_in_float32():
    x = np.array([[1e30, 1e-30]])
    assert np.isfinite(np.float32(norm_ratios(Arrays(x), [lambda values, start: values[:1].fill(0)])[0]))


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 5, 4, 3), (2, 2, 5, 4, 3)])
def test_matrices_are_merged_one_by_one(shape):
    x = RNG.standard_normal(shape).astype(np.float32)
    got = merge_matrices(x.copy(), (0.5, -2.0), 3.0, lambda matrices: matrices[0] @ matrices[1].T @ matrices[1])
    for place in np.ndindex(shape[1:-2]):
        a, b = 0.5 * x[0][place].astype(np.float64), -2.0 * x[1][place].astype(np.float64)
        np.testing.assert_allclose(got[place], 3 * a @ b.T @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (2, 7), (2, 4, 3)])
def test_what_is_not_merged_as_a_matrix_becomes_the_mean(shape):
    x = RNG.standard_normal(shape).astype(np.float32)
    merge = None if len(shape) > 2 else lambda matrices: pytest.fail(f"{matrices.shape}")
    expected = 3 * (0.5 * x[0].astype(np.float64) - 2 * x[1]) / 2
    np.testing.assert_allclose(merge_matrices(x.copy(), (0.5, -2.0), 3.0, merge), expected, rtol=1e-5, atol=1e-6)


def test_a_matrix_that_is_not_finite_becomes_nan_and_no_other():
    x = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    x[1, 1, 2, 3] = np.inf
    x[0, 2, 0, 0] = np.nan
    got = merge_matrices(x.copy(), (1.0, 1.0), 1.0, lambda matrices: matrices[0] + matrices[1])
    np.testing.assert_array_equal(got[0], x[0, 0] + x[1, 0])
    assert np.isnan(got[1:]).all()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (1, 5), (5, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_thin_svd_leaves_out_what_is_rounding(shape, scale):
    rank = min(2, *shape)
    x = RNG.standard_normal((shape[0], rank)) @ RNG.standard_normal((rank, shape[1]))
    x = (x * scale).astype(np.float32)
    u, s, vt = (part.astype(np.float64) for part in thin_svd(x))
    assert s.shape == (rank,)
    np.testing.assert_allclose(s, np.linalg.svd(x.astype(np.float64), compute_uv=False)[:rank], rtol=1e-5)
    np.testing.assert_allclose((u * s) @ vt, x, rtol=1e-5, atol=1e-5 * scale)
    assert thin_svd(np.zeros(shape, np.float32))[1].shape == (0,)
