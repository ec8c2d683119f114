"""`breadcrumbs_ties` against float64 one element at a time, and against mergekit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import WEIGHTS, Example, run
from tests.merge.methods.test_breadcrumbs import DENSITY, GAMMA, kept_by_breadcrumbs
from tests.merge.methods.test_ties import expected_with_choices

RNG = np.random.default_rng(0)
EXAMPLE = Example(
    {"weight": WEIGHTS, "density": DENSITY, "gamma": GAMMA},
    neutral={"weight": (1 / 3,) * 3, "density": (1.0,) * 3},
)


@pytest.mark.parametrize("vote", ["weighted", "total", "frequency"])
@pytest.mark.parametrize("divisor", ["weights", "count", "none"])
def test_every_choice(vote, divisor):
    x = RNG.integers(-9, 10, (3, 900)) / 8
    weights = np.array([0.5, 0.25, 0.75])  # no vote is rounded
    kept = kept_by_breadcrumbs(x, DENSITY, GAMMA)
    expected = 0.9 * expected_with_choices(x, weights, kept, vote=vote, zero=1.0, divisor=divisor)
    choices = {"vote": vote, "normalize": divisor != "none", "lambda": 0.9}
    if divisor != "none":
        choices["divisor"] = divisor
    got = run("breadcrumbs_ties", x, weight=tuple(weights), density=DENSITY, gamma=GAMMA, **choices)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("zero_vote", "zero"), [("plus", 1.0), ("majority", -1.0)])
def test_a_vote_of_zero(zero_vote, zero):
    x = np.random.default_rng(3).integers(-9, 7, (3, 900)) / 8  # more of them negative
    kept = kept_by_breadcrumbs(x, DENSITY, GAMMA)
    assert np.sign((x * kept).sum(axis=0)).sum() < -20
    weights = np.array([0.5, 0.25, 0.75])
    expected = expected_with_choices(x, weights, kept, vote="total", zero=zero, divisor="none")
    choices = {"vote": "total", "zero_vote": zero_vote}
    got = run("breadcrumbs_ties", x, weight=tuple(weights), density=DENSITY, gamma=GAMMA, **choices)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [{}, {"rescale": True, "normalize": True, "lambda": 0.7}], ids=str)
def test_mergekit(shared):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((3, 50, 40)).astype(np.float32)
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    own = {"weight": list(WEIGHTS), "density": list(DENSITY), "gamma": list(GAMMA)}
    expected = merge_tensors(tensors, "breadcrumbs_ties", parameters=shared | own, base_index=0)
    got = run("breadcrumbs_ties", x, weight=WEIGHTS, density=DENSITY, gamma=GAMMA, **shared)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)
