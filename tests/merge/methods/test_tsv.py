"""`tsv` against its definition in float64 with eigenvalues in place of singular values, and by closed forms."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tests.merge.laws import WEIGHTS, Example, run, settings
from toolkit.merge.method import load_method
from toolkit.merge.methods.tsv import orthonormal

RNG = np.random.default_rng(0)
EXAMPLE = Example({"weight": WEIGHTS, "lambda": 0.8}, neutral={"keep": 1.0}, rtol=3e-5)


def whiten(columns: np.ndarray) -> np.ndarray:
    """`C (C^T C)^(-1/2)`, for independent columns."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return columns @ (vectors / np.sqrt(values)) @ vectors.T


def triples(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `count` singular triples of all matrices: `[N, R]`, `[R]`, `[K, R]`."""
    found = [np.linalg.svd(matrix.astype(np.float64), full_matrices=False) for matrix in x]
    us = np.hstack([u[:, :count] for u, _, _ in found])
    return us, np.hstack([s[:count] for _, s, _ in found]), np.hstack([vt[:count].T for _, _, vt in found])


def expected_tsv(x: np.ndarray, count: int) -> np.ndarray:
    u, s, v = triples(x, count)
    return np.einsum("nr,r,kr->nk", whiten(u), s, whiten(v))


def truncated(matrix: np.ndarray, count: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :count] * s[:count]) @ vt[:count]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15), (13, 14)])
@pytest.mark.parametrize("models", [2, 3, 5])
def test_tsv(shape, models):
    x = RNG.standard_normal((models, *shape))
    weights = tuple(RNG.uniform(0.5, 2, models))
    got = run("tsv", x, weight=weights, **{"lambda": 1.3})
    expected = 1.3 * expected_tsv(np.array(weights)[:, None, None] * x, min(shape) // models)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(("keep", "count"), [(0.25, 3), (0.01, 1), (0.3, 3)])
def test_share_of_the_rank_that_is_kept(keep, count):
    x = RNG.standard_normal((3, 12, 20))
    np.testing.assert_allclose(run("tsv", x, keep=keep), expected_tsv(x, count), atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 7), (7, 1)])
def test_one_task_of_full_rank_comes_out_as_it_is(shape):
    x = RNG.standard_normal((1, *shape)).astype(np.float32)
    np.testing.assert_allclose(run("tsv", x), x[0], atol=1e-5)


def test_tasks_in_orthogonal_spaces_add_up_exactly():
    left, right = (np.linalg.qr(RNG.standard_normal((20, 20)))[0] for _ in range(2))
    parts = [RNG.standard_normal((8, 8)), RNG.standard_normal((12, 12))]
    x = np.stack([left[:, :8] @ parts[0] @ right[:8], left[:, 8:] @ parts[1] @ right[8:]])
    expected = truncated(x[0], 10) + truncated(x[1], 10)
    np.testing.assert_allclose(run("tsv", x), expected, atol=1e-4)


def test_vectors_become_orthonormal_and_stay_nearest():
    u, _, v = triples(RNG.standard_normal((3, 30, 24)), 8)
    for columns in (u, v):
        got = orthonormal(columns.astype(np.float32)).astype(np.float64)
        np.testing.assert_allclose(got.T @ got, np.eye(24), atol=1e-5)
        # Orthogonal Procrustes: the inner product with the columns is the sum of their singular values, its maximum.
        assert (got * columns).sum() == pytest.approx(np.linalg.svd(columns, compute_uv=False).sum(), rel=1e-5)


@pytest.mark.parametrize("models", [2, 3])
def test_equal_tasks_give_what_one_of_them_keeps(models):
    # The authors' code adds directions in which no task points: its factors are completed by LAPACK.
    one = RNG.standard_normal((18, 24))
    got = run("tsv", np.repeat(one[None], models, axis=0))
    np.testing.assert_allclose(got, truncated(one, 18 // models), atol=1e-4)


def test_a_task_that_does_not_change_the_matrix_has_no_say():
    x = RNG.standard_normal((3, 12, 20))
    x[1] = 0
    np.testing.assert_allclose(run("tsv", x), expected_tsv(x[[0, 2]], 4), atol=1e-4)


def test_tasks_of_low_rank_keep_no_more_than_they_have():
    x = np.einsum("tnr,trk->tnk", RNG.standard_normal((2, 20, 3)), RNG.standard_normal((2, 3, 16)))
    np.testing.assert_allclose(run("tsv", x), expected_tsv(x, 3), atol=3e-4)


def test_a_stack_is_merged_matrix_by_matrix_and_vectors_are_averaged():
    x = RNG.standard_normal((3, 2, 3, 6, 5)).astype(np.float32)
    got = run("tsv", x, weight=WEIGHTS)
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(got[place], run("tsv", x[:, *place], weight=WEIGHTS))
    for params, vectors in (({}, x[:, 0, 0, 0]), ({"average": True}, x)):
        expected = np.tensordot(WEIGHTS, vectors.astype(np.float64), 1) * 2 / 3
        got = run("tsv", vectors, weight=WEIGHTS, **params, **{"lambda": 2.0})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (4, 120, 90), (1, 5000), (5000, 1), (5000,)])
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("keep", [None, 1.0])
def test_memory_is_bounded_as_declared(shape, models, keep):
    loaded = load_method("tsv")
    params, x = settings("tsv", {"keep": keep}, models), RNG.standard_normal((models, *shape)).astype(np.float32)
    tracemalloc.start()
    loaded.combine(x, params, None, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= loaded.memory(shape, models)
