"""`della` against float64 one element at a time, and against mergekit given the same masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import WEIGHTS, Example, run
from tests.merge.methods.test_della_linear import DENSITY, EPSILON, dropped, feed_masks, masks
from tests.merge.methods.test_ties import expected_with_choices

RNG = np.random.default_rng(0)
EXAMPLE = Example(
    {"weight": WEIGHTS, "density": DENSITY, "epsilon": EPSILON},
    neutral={"weight": WEIGHTS, "density": (1.0,) * 3},
    symmetric=False,
)


@pytest.mark.parametrize("rescale_by", ["norm", "probability"])
@pytest.mark.parametrize("vote", ["weighted", "total", "frequency"])
@pytest.mark.parametrize("divisor", ["weights", "count", "none"])
def test_every_choice(rescale_by, vote, divisor):
    x = RNG.standard_normal((3, 20, 45)).astype(np.float32)
    weights = np.array([0.5, 0.3, 0.7])
    parts = dropped(x, DENSITY, EPSILON, rescale_by).reshape(3, -1)
    expected = 0.9 * expected_with_choices(parts, weights, parts != 0, vote=vote, zero=1.0, divisor=divisor)
    choices = {"rescale_by": rescale_by, "vote": vote, "normalize": divisor != "none", "lambda": 0.9}
    if divisor != "none":
        choices["divisor"] = divisor
    got = run("della", x, weight=tuple(weights), density=DENSITY, epsilon=EPSILON, **choices)
    np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("zero_vote", "zero"), [("plus", 1.0), ("majority", -1.0)])
def test_a_vote_of_zero(zero_vote, zero):
    x = (RNG.standard_normal((3, 20, 45)) - 0.1).astype(np.float32)  # more of them negative
    parts = dropped(x, DENSITY, EPSILON, "norm").reshape(3, -1)
    assert np.sign(np.sign(parts).sum(axis=0)).sum() < -20
    expected = expected_with_choices(
        parts, np.array(WEIGHTS), parts != 0, vote="frequency", zero=zero, divisor="weights"
    )
    choices = {"vote": "frequency", "zero_vote": zero_vote}
    got = run("della", x, weight=WEIGHTS, density=DENSITY, epsilon=EPSILON, **choices)
    np.testing.assert_allclose(got.reshape(-1), expected, rtol=1e-5, atol=1e-6)


def test_mergekit_on_the_same_masks(monkeypatch):
    # Its defaults: normalized here, not in `della_linear`.
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((3, 50, 40)).astype(np.float32)
    epsilon = (0.2, 0.4, 0.1)
    feed_masks(monkeypatch, masks(x, DENSITY, epsilon))
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    own = {"weight": list(WEIGHTS), "density": list(DENSITY), "epsilon": list(epsilon)}
    expected = merge_tensors(tensors, "della", parameters=own, base_index=0)
    got = run("della", x, weight=WEIGHTS, density=DENSITY, epsilon=epsilon)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)
