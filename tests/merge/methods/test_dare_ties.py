"""`dare_ties` against float64 one element at a time, and against mergekit and PEFT given the same masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.merge.laws import WEIGHTS, Example, run, settings
from tests.merge.methods.test_dare_linear import DENSITY, dropped, feed_masks, masks
from tests.merge.methods.test_ties import expected_with_choices

RNG = np.random.default_rng(0)
EXAMPLE = Example(
    {"weight": WEIGHTS, "density": DENSITY},
    neutral={"weight": (1 / 3,) * 3, "density": (1.0,) * 3},
    symmetric=False,
)


@pytest.mark.parametrize("rescale_by", ["norm", "density"])
@pytest.mark.parametrize("vote", ["weighted", "total", "frequency"])
@pytest.mark.parametrize("divisor", ["weights", "count", "none"])
def test_every_choice(rescale_by, vote, divisor):
    x = RNG.standard_normal((3, 1000)).astype(np.float32)
    weights = np.array([0.5, 0.3, 0.7])
    parts = dropped(x, DENSITY, rescale_by, seed=3)
    expected = 0.9 * expected_with_choices(parts, weights, parts != 0, vote=vote, zero=1.0, divisor=divisor)
    choices = {"rescale_by": rescale_by, "vote": vote, "normalize": divisor != "none", "seed": 3, "lambda": 0.9}
    if divisor != "none":
        choices["divisor"] = divisor
    got = run("dare_ties", x, weight=tuple(weights), density=DENSITY, **choices)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_vote", ["plus", "majority"])
@pytest.mark.parametrize("rescale_by", ["norm", "density"])
def test_a_vote_of_zero(zero_vote, rescale_by):
    x = RNG.integers(-3, 3, (3, 1000)).astype(np.float32)  # more of them negative
    parts = dropped(x, DENSITY, rescale_by)
    zero = -1.0 if zero_vote == "majority" else 1.0
    assert np.sign(np.sign(parts).sum(axis=0)).sum() < -50
    weights = np.array(WEIGHTS)
    expected = expected_with_choices(parts, weights, parts != 0, vote="frequency", zero=zero, divisor="count")
    choices = {"rescale_by": rescale_by, "vote": "frequency", "divisor": "count", "normalize": True}
    got = run("dare_ties", x, weight=WEIGHTS, density=DENSITY, zero_vote=zero_vote, **choices)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_the_paper_resolves_votes_of_zero_as_ties_does():
    assert settings("dare_ties", {"preset": "paper"}, 2).zero_vote == "majority"
    assert settings("dare_ties", {"preset": "peft"}, 2).zero_vote == "plus"
    assert settings("ties", {"preset": "paper"}, 2).zero_vote == "majority"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.4), (1.0, 0.5, -1.0)])
def test_mergekit_on_the_same_masks(monkeypatch, normalize, weights):
    from mergekit.merge_methods import merge_tensors

    x = RNG.standard_normal((3, 50, 40)).astype(np.float32)
    shared = {"lambda": 0.7, "normalize": normalize}
    feed_masks(monkeypatch, masks((50, 40), DENSITY))
    tensors = [torch.zeros(50, 40), *map(torch.from_numpy, x)]
    own = {"weight": list(weights), "density": list(DENSITY)}
    expected = merge_tensors(tensors, "dare_ties", parameters=shared | own, base_index=0)
    got = run("dare_ties", x, weight=weights, density=DENSITY, **shared)
    # Where agreeing weights nearly cancel, both divide by what rounding leaves of them.
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_peft_on_the_same_masks(monkeypatch, method):
    # At a negative weight PEFT still adds what agreed before weighting, which no other tool does.
    from peft.utils.merge_utils import dare_ties

    x = RNG.standard_normal((3, 2000)).astype(np.float32)
    feed_masks(monkeypatch, masks((2000,), (0.3,) * 3))
    expected = dare_ties([*map(torch.from_numpy, x)], torch.tensor(WEIGHTS), 0.3, method)
    got = run("dare_ties", x, preset="peft", vote=method, weight=WEIGHTS, density=(0.3,) * 3)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_one_model_by_the_paper_is_its_delta_on_average():
    x = RNG.standard_normal((1, 400)).astype(np.float32)
    seeds = 2000
    drawn = np.stack([run("dare_ties", x, preset="paper", density=(0.4,), seed=s) for s in range(seeds)])
    assert (np.abs(drawn.mean(axis=0) - x[0]) < 5 * np.abs(x[0]) * np.sqrt(1.5 / seeds)).all()
