"""`model_stock` against the paper's formula in float64, pair by pair, and against mergekit in float64."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from tests.merge.laws import Example, run
from toolkit.checkpoints import deltas

RNG = np.random.default_rng(0)
EXAMPLE = Example({}, neutral={})


def expected_model_stock(x: np.ndarray) -> np.ndarray:
    """`t` times the mean of deltas `[M, N]`, in float64."""
    pairs = []
    for a, b in combinations(x.astype(np.float64), 2):
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        pairs.append(a @ b / norms if norms else 0.0)
    cosine, count = np.mean(pairs), len(x)
    below = 1 + (count - 1) * cosine
    return (count * cosine / below if below > 1e-6 else 0.0) * x.astype(np.float64).mean(axis=0)


def correlated(models: int, *shape: int) -> np.ndarray:
    return (RNG.standard_normal((models, *shape)) + 0.7 * RNG.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("models", [2, 3, 4])
@pytest.mark.parametrize("chunk", [7, 100, 65536])
def test_model_stock(models, chunk, monkeypatch):
    monkeypatch.setattr(deltas, "CHUNK", chunk)
    x = correlated(models, 30, 20)
    whole = expected_model_stock(x.reshape(models, -1)).reshape(30, 20)
    np.testing.assert_allclose(run("model_stock", x), whole, rtol=1e-5, atol=1e-7)
    rows = np.stack([expected_model_stock(x[:, row]) for row in range(30)])
    np.testing.assert_allclose(run("model_stock", x, filter_wise=True), rows, rtol=1e-5, atol=1e-6)


def test_the_paper_for_two_models():
    """`t = 2 cos / (1 + cos)`; here of an angle of 60 degrees, 2/3."""
    x = np.array([[1.0, 0.0], [0.5, np.sqrt(0.75)]], np.float32)
    np.testing.assert_allclose(run("model_stock", x), 2 / 3 * x.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shape", [(9,), (1,), (12, 7), (3, 4, 5), (6, 1)], ids=str)
@pytest.mark.parametrize("models", [2, 3])
def test_model_stock_is_mergekits(shape, models, filter_wise):
    from mergekit.merge_methods import merge_tensors

    x = correlated(models, *shape)
    tensors = [torch.zeros(shape, dtype=torch.float64), *torch.from_numpy(x.astype(np.float64))]
    expected = merge_tensors(tensors, "model_stock", parameters={"filter_wise": filter_wise}, base_index=0).numpy()
    got = run("model_stock", x, filter_wise=filter_wise)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_small_deltas_are_merged_as_large_ones(filter_wise):
    # mergekit divides by a product of norms of at least 1e-6: at norms of 1e-4 it keeps 2% of equal deltas.
    x = np.repeat(correlated(1, 20, 15), 3, axis=0) * np.float32(1e-8)
    np.testing.assert_allclose(run("model_stock", x, filter_wise=filter_wise), x[0], rtol=1e-6)
    x = correlated(3, 20, 15)
    small = run("model_stock", x * 2.0**-60, filter_wise=filter_wise) * 2.0**60
    np.testing.assert_allclose(small, run("model_stock", x, filter_wise=filter_wise), rtol=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_limits(filter_wise):
    a, b = correlated(2, 5, 8)
    assert not run("model_stock", np.stack([a, -a]), filter_wise=filter_wise).any()  # the directions cancel
    assert not run("model_stock", np.stack([a, 0 * a]), filter_wise=filter_wise).any()  # orthogonal to a zero delta
    x = np.stack([a, b, 0 * a])
    expected = np.stack([expected_model_stock(x[:, row]) for row in range(5)])
    np.testing.assert_allclose(run("model_stock", x, filter_wise=True), expected, rtol=1e-5, atol=1e-7)
