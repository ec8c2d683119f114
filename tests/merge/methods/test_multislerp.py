"""`multislerp` against all steps of its description in float64, and against mergekit in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.merge.laws import WEIGHTS, Example, run

RNG = np.random.default_rng(0)
EXAMPLE = Example({"weight": WEIGHTS}, neutral={"weight": WEIGHTS})


def expected_multislerp(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Project onto the tangent space at the mean direction, add, and map back to the sphere, in float64."""
    v = x.reshape(len(x), -1).astype(np.float64)
    norms = np.linalg.norm(v, axis=1)
    units = v / norms[:, None]
    mean = weights @ units
    mean /= np.linalg.norm(mean)
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    length = np.linalg.norm(tangent)
    direction = np.cos(length) * mean + (np.sin(length) / length * tangent if length else 0)
    return (weights @ norms * direction).reshape(x.shape[1:])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.2), (1.0, 0.5, -0.2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(weights, normalize):
    x = RNG.standard_normal((3, 20, 15)).astype(np.float32) * np.array([1, 10, 0.1], np.float32)[:, None, None]
    x += RNG.standard_normal((20, 15)).astype(np.float32)
    got = run("multislerp", x, weight=weights, normalize_weights=normalize)
    shares = np.array(weights) / (sum(weights) if normalize else 1)
    np.testing.assert_allclose(got, expected_multislerp(x, shares), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.3, 0.1)])
def test_multislerp_is_mergekits(weights, normalize, base):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((3, 20, 15)).astype(np.float32).astype(np.float64)
    tensors = [*([torch.zeros(20, 15, dtype=torch.float64)] if base else []), *torch.from_numpy(x)]
    parameters = {"weight": list(weights), "normalize_weights": normalize}
    expected = merge_tensors(tensors, "multislerp", parameters=parameters, base_index=0 if base else None).numpy()
    got = run("multislerp", x, weight=weights, normalize_weights=normalize)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_directions_that_cancel_give_the_straight_mean():
    # mergekit stops with an error for three models or more, and for small deltas, which it takes for no direction.
    a, b = RNG.standard_normal((2, 6, 5)).astype(np.float32)
    for x, weights in (((a, -3 * a), (1.0, 1.0)), ((a, -a, b, -b), (0.3, 0.3, 0.2, 0.2)), ((0 * a, 0 * b), (1.0, 2.0))):
        shares = np.array(weights) / sum(weights)
        got = run("multislerp", np.stack(x), weight=weights)
        np.testing.assert_allclose(got, np.tensordot(shares, np.stack(x).astype(float), 1), rtol=1e-5, atol=1e-6)


def test_small_deltas_are_averaged_as_large_ones():
    x = RNG.standard_normal((3, 6, 5)).astype(np.float32)
    got = run("multislerp", x * 2.0**-60, weight=WEIGHTS) * 2.0**60
    np.testing.assert_allclose(got, run("multislerp", x, weight=WEIGHTS), rtol=1e-6)


def test_a_zero_model_counts_for_the_norm_only():
    a, b = RNG.standard_normal((2, 6, 5)).astype(np.float32)
    without = expected_multislerp(np.stack([a, b]), np.array([0.5, 0.3]))
    got = run("multislerp", np.stack([a, b, 0 * a]), weight=WEIGHTS)
    np.testing.assert_allclose(got, without, rtol=1e-5, atol=1e-6)


def test_weights_that_cannot_be_normalized_are_refused():
    with pytest.raises(ValidationError, match="sum to 0"):
        run("multislerp", np.ones((2, 3)), weight=(1.0, -1.0))
