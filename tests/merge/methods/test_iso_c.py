"""`iso_c` against its definition in float64, and by the spectrum of its result."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tests.merge.laws import WEIGHTS, Example, run, settings
from toolkit.merge.method import load_method

RNG = np.random.default_rng(0)
# Equal matrices come out with another spectrum, unless they are averaged.
EXAMPLE = Example({"weight": WEIGHTS, "lambda": 0.8}, neutral={"average": True}, rtol=3e-5)


def expected_iso_c(total: np.ndarray) -> np.ndarray:
    """The polar factor of a full-rank `total`, from its Gram matrix, times the mean singular value, in float64."""
    if total.shape[0] < total.shape[1]:
        return expected_iso_c(total.T).T
    squares, vectors = np.linalg.eigh(total.T @ total)
    return np.sqrt(squares).mean() * total @ (vectors / np.sqrt(squares)) @ vectors.T


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15), (1, 9), (9, 1)])
def test_iso_c(shape):
    x = RNG.standard_normal((3, *shape))
    got = run("iso_c", x, weight=WEIGHTS, **{"lambda": 1.5})
    expected = 1.5 * expected_iso_c(np.tensordot(WEIGHTS, x, 1))
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max() * max(shape))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_spectrum(shape):
    x = RNG.standard_normal((4, *shape))
    u, s, vt = np.linalg.svd(x.sum(axis=0), full_matrices=False)
    got = run("iso_c", x).astype(np.float64)
    spectrum = np.linalg.svd(got, compute_uv=False)
    np.testing.assert_allclose(spectrum, s.mean(), rtol=1e-5)
    assert spectrum.sum() == pytest.approx(s.sum(), rel=1e-5)
    np.testing.assert_allclose(u.T @ got @ vt.T, s.mean() * np.eye(len(s)), atol=2e-4)


def test_directions_that_no_model_changes_stay_unchanged():
    # The authors' code gives the 9 others the mean length, in directions that depend on the LAPACK at hand.
    rows, columns = RNG.standard_normal((20, 3)), RNG.standard_normal((3, 12))
    scales = RNG.uniform(1, 2, (2, 3))
    x = np.stack([(rows * scale) @ columns for scale in scales])
    got = run("iso_c", x).astype(np.float64)
    s = np.linalg.svd(x.sum(axis=0), compute_uv=False)[:3]
    expected = np.concatenate([np.full(3, s.mean()), np.zeros(9)])
    np.testing.assert_allclose(np.linalg.svd(got, compute_uv=False), expected, atol=1e-4)
    np.testing.assert_allclose(got @ np.linalg.pinv(columns) @ columns, got, atol=1e-4)


def test_a_stack_is_merged_matrix_by_matrix_and_vectors_are_averaged():
    x = RNG.standard_normal((3, 2, 3, 6, 5)).astype(np.float32)
    got = run("iso_c", x, weight=WEIGHTS)
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(got[place], run("iso_c", x[:, *place], weight=WEIGHTS))
    for params, vectors in (({}, x[:, 0, 0, 0]), ({"average": True}, x)):
        expected = np.tensordot(WEIGHTS, vectors.astype(np.float64), 1) * 2 / 3
        got = run("iso_c", vectors, weight=WEIGHTS, **params, **{"lambda": 2.0})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (4, 120, 90), (1, 5000), (5000, 1), (5000,)])
@pytest.mark.parametrize("models", [1, 3])
def test_memory_is_bounded_as_declared(shape, models):
    loaded = load_method("iso_c")
    params, x = settings("iso_c", {}, models), RNG.standard_normal((models, *shape)).astype(np.float32)
    tracemalloc.start()
    loaded.combine(x, params, None, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= loaded.memory(shape, models)
