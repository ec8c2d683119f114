"""`breadcrumbs` against brute force in float64, and against mergekit where no two magnitudes are equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import WEIGHTS, Example, run

RNG = np.random.default_rng(0)
DENSITY, GAMMA = (0.3, 0.6, 0.95), (0.01, 0.1, 0.2)
EXAMPLE = Example(
    {"weight": WEIGHTS, "density": DENSITY, "gamma": GAMMA},
    neutral={"weight": (1 / 3,) * 3, "density": (1.0,) * 3},
)


def kept_by_breadcrumbs(x: np.ndarray, density: tuple[float, ...], gamma: tuple[float, ...]) -> np.ndarray:
    """Sort each row of `[M, N]` by magnitude, then by place, and drop both ends."""
    kept = np.zeros(x.shape, bool)
    for i, row in enumerate(x):
        count = max(1, int(density[i] * len(row)))
        top = min(int(gamma[i] * len(row)), len(row) - count)
        order = sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))
        kept[i, order[top : top + count]] = True
    return kept


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["normal", "grid"])
def test_closed_form(kind, rescale, normalize):
    x = RNG.standard_normal((3, 900)) if kind == "normal" else RNG.integers(-3, 4, (3, 900)) / 4
    x = x.astype(np.float32).astype(np.float64)
    weights = np.array([0.5, -0.3, 0.7])
    parts = np.where(kept_by_breadcrumbs(x, DENSITY, GAMMA), x, 0)
    if rescale:
        parts *= (np.abs(x).sum(axis=1) / np.abs(parts).sum(axis=1))[:, None]
    expected = 0.8 * (weights @ parts) / (weights.sum() if normalize else 1)
    shared = {"normalize": normalize, "rescale": rescale, "lambda": 0.8}
    got = run("breadcrumbs", x, weight=tuple(weights), density=DENSITY, gamma=GAMMA, **shared)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 10, 64, 101, 5000, 150_000])
@pytest.mark.parametrize("density", [0.01, 0.5, 0.9, 0.995, 1.0])
def test_exact_number_at_any_size(count, density):
    # mergekit 0.1.5 keeps none where the density leaves less than one.
    x = RNG.permutation(np.arange(1.0, count + 1))[None]
    kept = np.sort(run("breadcrumbs", x, density=(density,), gamma=(0.05,)))
    kept = kept[kept != 0]
    number = max(1, int(density * count))
    top = min(int(0.05 * count), count - number)
    np.testing.assert_array_equal(kept, np.arange(count - top - number + 1, count - top + 1))


@pytest.mark.parametrize("shared", [{}, {"rescale": True, "normalize": True, "lambda": 0.7}], ids=str)
def test_mergekit(shared):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((3, 50, 40)).astype(np.float32)
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    own = {"weight": list(WEIGHTS), "density": list(DENSITY), "gamma": list(GAMMA)}
    expected = merge_tensors(tensors, "breadcrumbs", parameters=shared | own, base_index=0)
    got = run("breadcrumbs", x, weight=WEIGHTS, density=DENSITY, gamma=GAMMA, **shared)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)
