"""`karcher` against what defines it, the vanishing mean of the logarithms, against slerp, and against mergekit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.merge.laws import WEIGHTS, Example, run

RNG = np.random.default_rng(0)
EXAMPLE = Example({"weight": WEIGHTS}, neutral={"weight": WEIGHTS})


def logarithm(at: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Return the tangent at a unit vector that points along the arc to another, as long as the arc."""
    rest = to - (to @ at) * at
    return np.arccos(to @ at) * rest / np.linalg.norm(rest)


@pytest.mark.parametrize("spread", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2), (5.0, 1.0, 1.0)])
def test_logarithms_at_the_mean_cancel(weights, spread):
    x = (RNG.standard_normal((3, 400)) * [[1], [3], [0.2]] * spread + RNG.standard_normal(400)).astype(np.float32)
    got = run("karcher", x, weight=weights).astype(np.float64)
    shares = np.array(weights) / sum(weights)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    assert np.linalg.norm(got) == pytest.approx(shares @ norms, rel=1e-6)
    mean = got / np.linalg.norm(got)
    logarithms = [logarithm(mean, v / n) for v, n in zip(x.astype(np.float64), norms, strict=True)]
    assert np.linalg.norm(shares @ np.array(logarithms)) < 1e-6


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_the_mean_of_two_lies_on_their_arc(t):
    x = RNG.standard_normal((2, 300)).astype(np.float32)
    a, b = (v / np.linalg.norm(v) for v in x.astype(np.float64))
    angle = np.arccos(a @ b)
    norm = (1 - t) * np.linalg.norm(x[0]) + t * np.linalg.norm(x[1])
    expected = norm * (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    np.testing.assert_allclose(run("karcher", x, weight=(1 - t, t)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("models", [2, 3, 5])
def test_karcher_is_mergekits_at_equal_weights(models):
    # mergekit has no weights; its defaults, 10 steps or a step of 1e-5, end earlier.
    from mergekit.merge_methods import merge_tensors

    x = (RNG.standard_normal((models, 30, 20)) * np.arange(1, models + 1)[:, None, None]).astype(np.float32)
    tensors = list(torch.from_numpy(x.astype(np.float64)))
    tight = merge_tensors(tensors, "karcher", parameters={"max_iter": 1000, "tol": 1e-12}).numpy()
    np.testing.assert_allclose(run("karcher", x), tight, rtol=1e-5, atol=2e-6)
    loose = merge_tensors(tensors, "karcher", parameters={"max_iter": 2, "tol": 1e-12}).numpy()
    np.testing.assert_allclose(run("karcher", x, max_iter=2), loose, rtol=1e-5, atol=2e-6)


def test_no_steps_give_the_normalized_mean():
    x = RNG.standard_normal((3, 50)).astype(np.float32)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    mean = np.array(WEIGHTS) @ (x / norms[:, None])
    expected = np.array(WEIGHTS) @ norms * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(run("karcher", x, weight=WEIGHTS, max_iter=0), expected, rtol=1e-5, atol=1e-6)


def test_limits():
    a, b = RNG.standard_normal((2, 60)).astype(np.float32)
    # Opposite directions: the straight mean; mergekit gives the first model's direction with the mean norm.
    np.testing.assert_allclose(run("karcher", np.stack([a, -3 * a])), -a, rtol=1e-5)
    # The heavier of two opposite models keeps its direction.
    np.testing.assert_allclose(run("karcher", np.stack([a, -a]), weight=(3.0, 1.0)), a, rtol=1e-5)
    # A zero model has no direction; it counts for the norm, as in mergekit.
    two = run("karcher", np.stack([a, b]), weight=(1.0, 2.0))
    np.testing.assert_allclose(run("karcher", np.stack([a, b, 0 * a]), weight=(1.0, 2.0, 3.0)), two / 2, rtol=1e-5)
    # mergekit takes models of a norm up to `tol` for zero.
    small = run("karcher", np.stack([a, b]) * 2.0**-60, weight=(1.0, 2.0)) * 2.0**60
    np.testing.assert_allclose(small, two, rtol=1e-6)
    # All weight on a zero model.
    np.testing.assert_array_equal(run("karcher", np.stack([a, 0 * a]), weight=(0.0, 1.0)), 0)


@pytest.mark.parametrize("weight", [(0.0, 0.0), (1.0, -0.5)])
def test_weights_are_not_negative_nor_all_zero(weight):
    with pytest.raises(ValidationError, match=r"all weights are 0|greater than or equal to 0"):
        run("karcher", np.ones((2, 3)), weight=weight)
