"""`sce` against float64 one element at a time, and against mergekit on deltas that are not small."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import Example, run

RNG = np.random.default_rng(0)
EXAMPLE = Example({"select_topk": 0.3}, neutral={"select_topk": 1.0})


def expected_sce(x: np.ndarray, share: float) -> np.ndarray:
    """SCE of `[M, N]` in float64."""
    x = x.astype(np.float64)
    variance = sum((a - b) ** 2 for i, a in enumerate(x) for b in x[:i])  # without the rounding of a mean
    differ = (x != x[0]).any(axis=0)
    order = sorted(range(x.shape[1]), key=lambda j: (-variance[j], j))
    selected = np.ones(x.shape[1], bool)
    if share < 1:
        selected[order[int(np.count_nonzero(differ) * share) :]] = False
    x = np.where(selected, x, 0)
    energy = (x**2).sum(axis=1)
    weights = energy / energy.sum() if energy.any() else np.ones(len(x))
    out = np.zeros(x.shape[1])
    for j, column in enumerate(x.T):
        sign = 1 if column.sum() >= 0 else -1
        agree = column * sign > 0
        if agree.any():
            out[j] = (weights * column)[agree].sum() / weights[agree].sum()
    return out


def unequal(shape: tuple[int, ...]) -> np.ndarray:
    """Deltas of three models of different size."""
    sizes = np.reshape([1.0, 0.5, 2.0], (3, *[1] * len(shape)))
    return (RNG.standard_normal((3, *shape)) * sizes).astype(np.float32)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-14, 1.0, 2.0**90])
def test_closed_form(share, scale):
    x = unequal((2000,))
    x[:, :300] = x[0, :300]  # elements that do not differ are never selected
    got = run("sce", x * np.float32(scale), select_topk=share)
    np.testing.assert_allclose(got / scale, expected_sce(x, share), rtol=2e-5, atol=1e-6)


def test_equal_variances_are_selected_by_place():
    x = RNG.integers(-1, 2, (3, 4000)).astype(np.float32)
    for share in (0.1, 0.4, 0.8):
        np.testing.assert_allclose(run("sce", x, select_topk=share), expected_sce(x, share), rtol=1e-5, atol=1e-6)


def test_variance_is_that_across_models():
    x = unequal((2000,))
    chosen = np.argsort(-x.astype(np.float64).var(axis=0))[:200]
    np.testing.assert_array_equal(np.flatnonzero(run("sce", x, select_topk=0.1)), np.sort(chosen))


def test_equal_values_do_not_differ():
    # The mean of three equal values is not always that value, once rounded.
    x = np.repeat(RNG.standard_normal((1, 5000)), 3, axis=0)
    x[1, 1234] *= 1.5
    got = run("sce", x, select_topk=1 - 1e-9)
    assert not got.any(), "one element differs, and less than one is selected"
    assert np.flatnonzero(run("sce", np.concatenate([x, x[:, ::-1]], axis=1), select_topk=0.5)).tolist() == [1234]


def test_many_slices():
    x = unequal((300, 700))
    np.testing.assert_allclose(
        run("sce", x, select_topk=0.2).reshape(-1), expected_sce(x.reshape(3, -1), 0.2), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_mergekit(share):
    # Where the mean squares add up to less than 1e-6, as those of most fine-tunes do, mergekit 0.1.5 gives all models
    # equal weights; and weights below 1e-6 that agree alone do not give that model. Here neither happens.
    from mergekit.merge_methods import merge_tensors

    x = unequal((50, 40))
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    expected = merge_tensors(tensors, "sce", parameters={"select_topk": share}, base_index=0)
    np.testing.assert_allclose(run("sce", x, select_topk=share), expected.numpy(), rtol=1e-5, atol=1e-6)
